"""A thousand exact streams at once, ten thousand who abort or disconnect and leave nothing, and ten-fold overload.

The device is modelled and its steps are of constant time. Streams: half of token ids, half of text, each compared with
what the oracle says under the request's id. Leaving: FIN or RST before, in and behind the reply, aborts by id, twice
and at once, one choice or three, streamed or not; what was heard must be a beginning of the request's own tokens; then
pages, requests, tasks and descriptors are those of before. Overload: an open loop at ten times of what the device can
serve, between two times of 70 percent; good is a request that is served within its deadline. Clients are in processes
of their own. At smoke size times are reported and not judged.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.evidence.evidence import Evidence
from tests.server import page
from tests.server.crowd import crowd, options
from tests.server.hostile.footprint import held, left_behind
from tests.server.serving import Serving, serving

RECOVERY_S = 5.0
TOKENS = 10
"""Outputs of a request of the overload."""
STEP_S = 0.04
RUNNING, QUEUED = 16, 32
CAPACITY_PER_S = RUNNING / (TOKENS * STEP_S)
"""Of its decode steps; prefills, of 1 ms, take a little of it."""
DEADLINE_S = 3 * (RUNNING + QUEUED) / CAPACITY_PER_S
"""Three times of what a request takes that waits behind a full queue."""


def streaming(smoke: bool) -> tuple[list[str], str]:
    """(what is wrong, what was seen) of the streams."""
    count, tokens = (200, 20) if smoke else (1_000, 50)
    with tempfile.TemporaryDirectory() as folder:
        settings = options(step_ns=100_000_000 if smoke else 250_000_000, running=count, queued=64, workers=1)
        with serving(Path(folder), *settings) as server:
            found = crowd("streams", port=server.port, count=count, tokens=tokens, workers=1)
            server.comes_to_rest()
            wrong = [*found["wrong"], *([server.errors[-1000:]] if server.errors else [])]
    if found["most"] != count:
        wrong.append(f"only {found['most']} streams were open at a time")
    rate = found["chunks"] / found["seconds"]
    said = f"{count:,} streams of {tokens} tokens in {found['seconds']:.1f} s, {rate:,.0f} chunks a second"
    return wrong, f"{said}, {found['most']:,} open at a time"


def leaving(smoke: bool) -> tuple[list[str], str]:
    """(what is wrong, what was seen) of those who leave."""
    count = 400 if smoke else 10_000
    with tempfile.TemporaryDirectory() as folder:
        settings = options(step_ns=2_000_000, running=256, queued=1024, workers=2)
        with serving(Path(folder), *settings) as server:
            common = {"port": server.port, "at_once": 100, "tokens": 300, "workers": 2}
            crowd("leavers", count=100, seed=0, prefix="first", **common)
            before = held(server, 2)
            found = crowd("leavers", count=count, seed=1, **common)
            left = left_behind(server, 2, before)
            state = server.comes_to_rest()
            wrong = [*found["wrong"], *left, *([server.errors[-1000:]] if server.errors else [])]
    ends, free, cached = found["ends"], state["free_tokens"], state["evictable_tokens"]
    said = ", ".join(f"{ends[end]:,} {end}" for end in sorted(ends))
    return wrong, f"{sum(ends.values()):,} clients: {said}; then {free:,} free + {cached:,} cached tokens of " + (
        f"{state['max_total_num_tokens']:,}, descriptors and tasks as before"
    )


def overloaded(smoke: bool) -> tuple[list[str], list[str]]:
    """(what is wrong, what was seen) of the overload."""
    calm_s, over_s = (2.0, 3.0) if smoke else (15.0, 20.0)
    calm, over = 0.7 * CAPACITY_PER_S, 10 * CAPACITY_PER_S
    with tempfile.TemporaryDirectory() as folder:
        settings = options(step_ns=round(STEP_S * 1e9), running=RUNNING, queued=QUEUED, workers=1)
        with serving(Path(folder), *settings) as server:
            phases = [[calm, calm_s], [over, over_s], [calm, calm_s + RECOVERY_S]]
            rows = np.array(crowd("overload", port=server.port, phases=phases, tokens=TOKENS))
            wrong = _at_rest(server)
    due, late, latency, status, retry = rows.T
    refused, good = status == 503, (status == 200) & (latency <= DEADLINE_S)
    if not np.isin(status, (200, 503)).all() or (retry[refused] < 1).any():
        wrong.append(f"statuses {np.unique(status)}, or no Retry-After")
    end_s = calm_s + over_s
    bad_after = due[(due >= end_s) & ~good]
    recovery_s = float(bad_after.max() - end_s) if len(bad_after) else 0.0
    if recovery_s > RECOVERY_S and not smoke:
        wrong.append(f"goodput is back only {recovery_s:.1f} s after the end")
    if not good[due < calm_s].all() and not smoke:
        wrong.append(f"{(~good[due < calm_s]).sum()} requests of the calm before were not served in time")
    ended = due + latency
    figures = [
        f"{name}: offered {_rate(due, begin, end):.0f}/s, good {_rate(ended[good], begin, end):.1f}/s, "
        f"served p50 {_ms(latency[(due >= begin) & (due < end) & (status == 200)], 50)}"
        for name, begin, end in (
            ("calm", 0.0, calm_s),
            ("overload", calm_s, end_s),
            ("after", end_s, end_s + RECOVERY_S),
            ("later", end_s + RECOVERY_S, end_s + RECOVERY_S + calm_s),
        )
    ]
    percentiles = ", ".join(f"p{p:g} {_ms(latency[refused], p)}" for p in (50, 90, 99, 100))
    figures.append(f"{refused.sum():,} refusals with 503 and Retry-After: {percentiles} from when they were due")
    figures.append(
        f"the driver itself sent at most {late.max() * 1000:.0f} ms late; last bad one {recovery_s:.2f} s after"
    )
    return wrong, figures


def _at_rest(server: Serving) -> list[str]:
    server.comes_to_rest()
    return [server.errors[-1000:]] if server.errors else []


def _rate(times_s: NDArray[np.float64], begin_s: float, end_s: float) -> float:
    return float(((times_s >= begin_s) & (times_s < end_s)).sum() / (end_s - begin_s))


def _ms(latencies_s: NDArray[np.float64], percentile: float) -> str:
    return f"{np.percentile(latencies_s, percentile) * 1000:.1f} ms" if len(latencies_s) else "none"


def check(smoke: bool) -> Evidence:
    """One after the other."""
    load = page.busy()
    streamed, streams = streaming(smoke)
    stayed, leavers = leaving(smoke)
    failed, overload = overloaded(smoke)
    wrong = [*streamed, *stayed, *failed]
    evidence = Evidence(
        figure=f"{streams}; {leavers}; {overload[-1]}; {len(wrong)} objections",
        bar=f"every stream exact; free + cached = capacity, nothing left; goodput back within {RECOVERY_S:.0f} s",
        passed=not wrong,
        details=(
            f"capacity {CAPACITY_PER_S:.0f} requests a second, deadline {DEADLINE_S:.1f} s",
            *overload,
            *wrong[:20],
        ),
    )
    seed = "0 and 1 of those who leave, 0 of the servers"
    return evidence if smoke else page.keep("serve.4", evidence, seed=seed, load=load)
