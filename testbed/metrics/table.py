"""The one-screen result table, in the form that users of the field's serving benchmarks know."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from testbed.metrics.aggregate import LATENCIES, SloMark
from testbed.ports import Stage

WIDTH = 58
_LABEL = 40
_CHECK = "check_"
_INPUTS = ("guess: ", "unmeasured: ")
"""How notes on inputs without a measurement begin."""


def result_table(
    figures: Mapping[str, float],
    percentiles: Sequence[float],
    marks: Iterable[SloMark] = (),
    heading: Mapping[str, str] | None = None,
    counters: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Text of the result: thresholds first, then requests, throughput, latencies, device, KV cache, loop.

    ``figures``: a run's aggregates; ``heading``: labels and words for the top; ``counters``: the run's own counts;
    ``notes``: those on guessed or unmeasured inputs are counted, the others are told in full, a line each.
    """
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]
    lines += [f"{label + ':':<{_LABEL}} {words}" for label, words in (heading or {}).items()]
    for mark in marks:
        sign = "\N{CHECK MARK}" if mark.met else "\N{BALLOT X}"
        lines.append(_row(f"{sign} {mark.key} <= {mark.limit:g}", mark.value))
    for label, key in _OVERALL:
        lines += _known(label, figures.get(key))
    for name, title in LATENCIES.items():
        lines.append(_section(title))
        for which in ("mean", "median", *(f"p{percentile:g}" for percentile in percentiles if percentile != 50)):
            lines.append(_row(f"{which.capitalize()} {name.upper()} (ms)", figures[f"{which}_{name}_ms"]))
        if name == "tpot" and figures["undefined_tpot"]:
            lines.append(_row("Undefined (single-token outputs)", figures["undefined_tpot"]))
    sections = {
        title: [line for label, key in rows for line in _known(label, figures.get(key))]
        for title, rows in _SECTIONS.items()
    }
    last = "Event loop" if sections["Event loop"] else "Client"
    sections[last] += [_row(name, count) for name, count in told_counters(counters or {}, figures).items()]
    for title, section in sections.items():
        lines += [_section(title), *section] if section else []
    guessed, others = parted_notes(notes)
    told = [f"Guessed or unmeasured inputs: {len(guessed)} (listed in the report)"] if guessed else []
    told += [f"Note: {note}" for note in others]
    lines += [_section("Notes"), *told] if told else []
    return "\n".join([*lines, "=" * WIDTH])


def parted_notes(notes: Iterable[str]) -> tuple[list[str], list[str]]:
    """A run's notes as (those on guessed or unmeasured inputs, all others), each said once."""
    once = list(dict.fromkeys(notes))
    guessed = [note for note in once if note.startswith(_INPUTS)]
    return guessed, [note for note in once if not note.startswith(_INPUTS)]


def told_counters(counters: Mapping[str, int], figures: Mapping[str, float]) -> dict[str, int]:
    """A run's counts for a person: words for names, without those that are figures, invariant checks in one sum."""
    told = {
        name.replace("_", " ").capitalize(): count
        for name, count in counters.items()
        if name not in figures and not name.startswith(_CHECK)
    }
    checks = sum(count for name, count in counters.items() if name.startswith(_CHECK))
    return told | ({"Invariants checked": checks} if checks else {})


def _section(title: str) -> str:
    return f" {title} ".center(WIDTH, "-")


def _row(label: str, value: float) -> str:
    return f"{label + ':':<{_LABEL}} {number(value)}"


def _known(label: str, value: float | None) -> list[str]:
    return [] if value is None or math.isnan(value) else [_row(label, value)]


def number(value: float) -> str:
    """A figure for a person: integers whole, others with two decimals, ``-`` where undefined."""
    if math.isnan(value):
        return "-"
    if isinstance(value, int):
        return f"{value:d}"
    return f"{value:.4f}" if 1e-4 <= abs(value) < 0.1 else f"{value:.2f}"


def signed(value: float) -> str:
    """A difference for a person: with its sign, whole from 1,000 on, ``-`` where undefined."""
    if math.isnan(value):
        return "-"
    return f"{value:+,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:+.3g}"


def percent(fraction: float) -> str:
    """A signed fraction in percent; ``-`` where undefined."""
    return "-" if math.isnan(fraction) else f"{round(100 * fraction, 1) + 0.0:+.1f} %"


def percent_more(ratio: float) -> str:
    """A ratio as percent above or below the whole; '' where undefined, or over a whole so small (a hundredth) that only
    the difference says anything."""
    return "" if math.isnan(ratio) or abs(ratio) > 100 else f"{100 * (ratio - 1):+.1f} %"


_OVERALL = (
    ("Successful requests", "completed"),
    ("Failed requests", "failed"),
    ("Benchmark duration (s)", "duration"),
    ("Total input tokens", "total_input_tokens"),
    ("Total generated tokens", "total_output_tokens"),
    ("Request throughput (req/s)", "request_throughput"),
    ("Request goodput (req/s)", "request_goodput"),
    ("Input token throughput (tok/s)", "input_throughput"),
    ("Output token throughput (tok/s)", "output_throughput"),
    ("Total token throughput (tok/s)", "total_token_throughput"),
    ("Peak output token throughput (tok/s)", "max_output_tokens_per_s"),
    ("Concurrency", "concurrency"),
    ("Peak concurrent requests", "max_concurrent_requests"),
)

_SECTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "Where requests spend their time": (
        ("Mean queue (ms)", "mean_queue_ms"),
        ("Mean prefill (ms)", "mean_prefill_ms"),
        ("Mean decode (ms)", "mean_decode_ms"),
        ("Mean retracted (ms)", "mean_retracted_ms"),
        ("Mean transfer (ms)", "mean_transfer_ms"),
    ),
    "Device": (
        ("Busy (%)", "device_busy_percent"),
        ("Bubbles: host (%)", "bubble_host_percent"),
        ("Bubbles: transfer (%)", "bubble_transfer_percent"),
        ("Idle: no work (%)", "bubble_no_work_percent"),
        ("Model FLOP utilisation (%)", "mfu_percent"),
        ("Memory bandwidth (%)", "bandwidth_percent"),
    ),
    "KV cache": (
        ("Capacity (tokens)", "kv_tokens"),
        ("Owned, mean (%)", "kv_use_mean_percent"),
        ("Owned, peak (%)", "kv_use_peak_percent"),
        ("Cached, mean (%)", "kv_cached_mean_percent"),
        ("Cache hit rate", "cache_hit_rate"),
        ("Evicted tokens", "evicted_tokens"),
    ),
    "Event loop": (
        ("Steps", "steps"),
        ("Mean batch size", "mean_batch_size"),
        ("Mean tokens per step", "mean_step_tokens"),
        ("Extra steps", "extra_steps"),
        ("Extra rows", "extra_rows"),
        ("Retractions", "retractions"),
        ("Host busy (%)", "host_busy_percent"),
        *((f"Host {stage.name.lower()} (us/step)", f"host_{stage.name.lower()}_us_per_step") for stage in Stage),
    ),
    "Client": (
        ("Mean send delay (ms)", "mean_send_delay_ms"),
        ("P99 send delay (ms)", "p99_send_delay_ms"),
        ("Max send delay (ms)", "max_send_delay_ms"),
    ),
}
