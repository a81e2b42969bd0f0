"""Prometheus metrics under SGLang's names, where the meaning is the same (SGLang 0.5, ``metrics/collector.py``)."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from testbed.server.protocol.native import used_tokens

FINE_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Bounds of gaps between tokens, s."""
COARSE_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
"""Bounds of whole waits, s."""


class ServerMetrics:
    """All metrics of a server, in a registry of its own."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model = model_name

        def counter(name: str, what: str) -> Counter:
            return Counter(f"sglang:{name}", what, ["model_name"], registry=registry).labels(model_name)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"sglang:{name}", what, ["model_name"], registry=registry).labels(model_name)

        def histogram(name: str, what: str, bounds: tuple[float, ...]) -> Histogram:
            made = Histogram(f"sglang:{name}", what, ["model_name"], buckets=bounds, registry=registry)
            return made.labels(model_name)

        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of ended requests.")
        self._generation_tokens = counter("generation_tokens", "Output tokens of ended requests.")
        self._cached_tokens = counter("cached_tokens", "Prompt tokens that were found in the prefix cache.")
        self._requests = counter("num_requests", "Requests that ended.")
        self._structured = counter("num_so_requests", "Requests with a grammar.")
        self._aborted = counter("num_aborted_requests", "Requests that were aborted.")
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", COARSE_S)
        self._between = histogram("inter_token_latency_seconds", "Between a token and the one before.", FINE_S)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", COARSE_S)
        self._queue = histogram("queue_time_seconds", "From arrival to the first launch.", COARSE_S)
        self._running = gauge("num_running_reqs", "Requests in the running batch.")
        self._waiting = gauge("num_queue_reqs", "Requests in the waiting queue.")
        self._used = gauge("num_used_tokens", "Tokens of the KV pool that requests hold.")
        self._usage = gauge("token_usage", "The same as a share of the pool, 0 to 1.")
        self._capacity = gauge("max_total_num_tokens", "Tokens of the KV pool.")
        self._ratio = gauge("new_token_ratio", "Share of its max_new_tokens that admission expects of a request.")

    def first_token(self, since_arrival_s: float) -> None:
        """A request's first token was sent."""
        self._first.observe(since_arrival_s)

    def next_tokens(self, gap_s: float, tokens: int) -> None:
        """``tokens`` more were sent ``gap_s`` behind the last; each took its share, as SGLang counts it."""
        for _ in range(tokens):
            self._between.observe(gap_s / tokens)

    def ended(
        self,
        reason: str,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        latency_s: float,
        queue_s: float | None = None,
        grammar: bool = False,
    ) -> None:
        """A request ended. ``reason``: a ``FinishReason``; ``queue_s``: None if it was never launched."""
        self._requests.inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._cached_tokens.inc(cached_tokens)
        self._generation_tokens.inc(output_tokens)
        self._whole.observe(latency_s)
        if queue_s is not None:
            self._queue.observe(queue_s)
        if grammar:
            self._structured.inc()
        if reason == "abort":
            self._aborted.inc()

    def state(self, state: Mapping[str, int | float | str]) -> None:
        """What the scheduler says of itself: the answer to ``GetInternalState``."""
        capacity, used = int(state["max_total_num_tokens"]), used_tokens(state)
        self._running.set(int(state["running"]))
        self._waiting.set(int(state["waiting"]))
        self._used.set(used)
        self._usage.set(used / capacity if capacity else 0.0)
        self._capacity.set(capacity)
        self._ratio.set(float(state["new_token_ratio"]))

    def page(self) -> tuple[bytes, str]:
        """The body of ``/metrics`` and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
