"""What a host is calibrated with: short workloads, each made to stir what some stage depends on. None of them judges.

A run of one decides nothing about a strategy; it spreads a dependence so wide that a line through it is known:

* ``rows``: users join one by one until 256 decode together. Every stage by rows; outputs sent; ends.
* ``prompts``: few users, prompts from a line to half the context, short answers: new tokens, and prompts cut in chunks.
* ``queue``: more users than seats: a long waiting queue beside a full batch, ends and admissions in every step.
* ``bursts``: many arrive together, then nobody does: several received and admitted in one step.
* ``prefixes``: prompts share long beginnings: matched tokens without many new ones.
* ``mixed``, ``stall_free``: chunks of prompts beside decode rows, as these batching strategies make them.
* ``sparse``: a request now and then; the loop sleeps in between and wakes with cold caches.

Each is run under both loops. The engine's options are the same in all, so that one open device serves them.
"""

from __future__ import annotations

from typing import Any

LOOPS = ("normal", "overlap")
ENGINE = {
    "kv_tokens": 65_536,
    "context_length": 2048,
    "max_running_requests": 256,
    "chunked_prefill_size": 512,
}
"""Pool and chunk are small: evictions and cut prompts happen within seconds."""


def host_workloads(seconds: float, context_tokens: int) -> dict[str, dict[str, Any]]:
    """Fields of a scenario by name: ``workload``, and ``batching`` where it is not the default.

    ``seconds``: how long requests are sent in each; those under way are then finished. ``context_tokens``: prompts and
    outputs stay below it.
    """
    half, quarter = context_tokens // 2, context_tokens // 4
    line, word = context_tokens // 64, context_tokens // 256
    closed = {
        "rows": _closed(256, (word, line), (line, 4 * line), ramp_s=0.8 * seconds),
        "prompts": _closed(4, (word, half), (2, 2 * word)),
        "queue": _closed(400, (word, 2 * line), (word, line), ramp_s=0.1 * seconds),
        "prefixes": _closed(24, (word, 2 * line), (2, line))
        | {"prefix": {"groups": 12, "prefix_tokens": _uniform(line, quarter + half // 4)}},
        "mixed": _closed(16, (line, half), (line, 4 * line)),
        "stall_free": _closed(16, (line, half), (line, 4 * line)),
    }
    timed = {
        "bursts": {
            "arrivals": {"kind": "bursts", "on_rate_per_s": 500, "on_s": 0.04, "off_s": 0.2, "durations": "fixed"},
            "lengths": _lengths((word, quarter), (word, 2 * line)),
        },
        "sparse": {
            "arrivals": {"kind": "poisson", "rate_per_s": 60},
            "lengths": _lengths((word, quarter), (2, 2 * word)),
        },
    }
    batching = {"mixed": "mixed_chunk", "stall_free": "stall_free"}
    return {
        name: {
            "workload": {**workload, "duration_s": seconds},
            "batching": batching.get(name, "prefill_first"),
        }
        for name, workload in (closed | timed).items()
    }


def _closed(users: int, prompt: tuple[int, int], output: tuple[int, int], ramp_s: float = 0.0) -> dict[str, Any]:
    return {
        "arrivals": {"kind": "closed_loop", "users": users, "ramp_s": ramp_s},
        "lengths": _lengths(prompt, output),
    }


def _lengths(prompt: tuple[int, int], output: tuple[int, int]) -> dict[str, Any]:
    return {"prompt_tokens": _uniform(*prompt), "output_tokens": _uniform(*output)}


def _uniform(low: int, high: int) -> dict[str, Any]:
    return {"kind": "uniform", "low": max(low, 1), "high": max(high, low, 1)}
