"""Prometheus metrics under SGLang's names, where the meaning is the same (SGLang 0.5, ``metrics/collector.py``)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from testbed.server.protocol.native import used_tokens

FINE_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Bounds of gaps between tokens, s."""
COARSE_S = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    50.0,
    100.0,
    200.0,
    500.0,
    1000.0,
)
"""Bounds of whole waits, s."""


class _Gaps(Collector):
    """A histogram that takes many equal observations at once, which Prometheus' own does not."""

    def __init__(self, name: str, what: str, model_name: str) -> None:
        self._family = (name, what)
        self._model = model_name
        self._counts = [0] * (len(FINE_S) + 1)
        self._sum_s = 0.0

    def observe(self, gap_s: float, times: int) -> None:
        self._counts[bisect_left(FINE_S, gap_s)] += times
        self._sum_s += gap_s * times

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Prometheus' hook: counts up to each bound."""
        bounds = [*(str(bound) for bound in FINE_S), "+Inf"]
        family = HistogramMetricFamily(*self._family, labels=["model_name"])
        family.add_metric([self._model], list(zip(bounds, accumulate(self._counts), strict=True)), self._sum_s)
        yield family


class ServerMetrics:
    """All metrics of a server, in a registry of its own."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry

        def counter(name: str, what: str) -> Counter:
            return Counter(f"sglang:{name}", what, ["model_name"], registry=registry).labels(model_name)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"sglang:{name}", what, ["model_name"], registry=registry).labels(model_name)

        def histogram(name: str, what: str) -> Histogram:
            made = Histogram(f"sglang:{name}", what, ["model_name"], buckets=COARSE_S, registry=registry)
            return made.labels(model_name)

        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of ended requests.")
        self._generation_tokens = counter("generation_tokens", "Output tokens of ended requests.")
        self._cached_tokens = counter("cached_tokens", "Prompt tokens that were found in the prefix cache.")
        self._requests = counter("num_requests", "Requests that ended.")
        self._structured = counter("num_so_requests", "Requests with a grammar.")
        self._aborted = counter("num_aborted_requests", "Requests that were aborted.")
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._between = _Gaps("sglang:inter_token_latency_seconds", "Between a token and the one before.", model_name)
        registry.register(self._between)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self._queue = histogram("queue_time_seconds", "From arrival to the first launch.")
        self._running = gauge("num_running_reqs", "Requests in the running batch.")
        self._waiting = gauge("num_queue_reqs", "Requests in the waiting queue.")
        self._used = gauge("num_used_tokens", "Tokens of the KV pool that requests hold.")
        self._usage = gauge("token_usage", "The same as a share of the pool, 0 to 1.")
        self._capacity = gauge("max_total_num_tokens", "Tokens of the KV pool.")
        self._ratio = gauge("new_token_ratio", "Share of its max_new_tokens that admission expects of a request.")

    def first_token(self, since_arrival_s: float) -> None:
        """A request's first token was sent."""
        self._first.observe(since_arrival_s)

    def later_tokens(self, span_s: float, tokens: int) -> None:
        """``tokens`` came in the ``span_s`` behind the one before them; each took its share, as SGLang counts it."""
        if tokens > 0:
            self._between.observe(span_s / tokens, tokens)

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

    def page(self) -> bytes:
        """The body of ``/metrics``."""
        return generate_latest(self._registry)
