"""From what clients saw to a run: the same columns as a simulation's, without the inside of the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed import api
from testbed.deployment import Engine
from testbed.metrics.columns import NS_PER_MS
from testbed.metrics.files import TEXT_COLUMNS
from testbed.metrics.recorder import Recorder
from testbed.metrics.records import CLIENT_COLUMNS, REQUEST_COLUMNS, Column, Records
from testbed.metrics.run import Run
from testbed.request import NEVER
from testbed.scenario.load import resolve
from testbed.study.bench.exchange import Counted, Exchange, Failure
from testbed.study.bench.wire import Server

LATE_MS = 10.0
BUSY_CPU = 0.8
"""Beyond these the driver is what was measured, not the server: the 99th percentile of how late requests were sent, and
the driver's share of a core."""


@dataclass(frozen=True)
class Driven:
    """What a driver brings home."""

    model: str
    """The name that was asked for."""
    exchanges: Sequence[Exchange]
    """In order of sending."""
    interrupted: bool
    cpu: float
    """Share of a core that the driver took."""


def bench_run(server: Server, engine: Engine, driven: Driven) -> Run:
    """The run that clients saw."""
    exchanges = sorted(driven.exchanges, key=lambda one: one.timed.arrival_ns)
    meta: dict[str, Any] = {
        "label": "bench",
        "model": driven.model,
        "server": server.endpoint,
        "driver_cpu_percent": 100 * driven.cpu,
        "notes": [*_interrupted(engine, driven), *engine.workload.notes(), *_notes(server, exchanges, driven.cpu)],
        "provenance": _provenance(server, engine.scenario.seed),
    }
    if driven.interrupted:
        meta["interrupted"] = True
    return Run(resolve(engine.scenario), bench_records(exchanges), meta)


def bench_records(exchanges: Sequence[Exchange]) -> Records:
    """The records of requests in order of arrival. A server's steps and spans are not known to its clients."""
    empty = Recorder().records({}, b"")
    empty.steps["flops"] = empty.steps["bytes"] = np.zeros(0)
    times = [one.token_times_ns() for one in exchanges]
    failures = Counter(f"failed_{one.failure}" for one in exchanges if one.failure is not None)
    rows = [_row(one, came) for one, came in zip(exchanges, times, strict=True)]
    return replace(
        empty,
        requests={name: _column(name, [row[name] for row in rows]) for name in (*REQUEST_COLUMNS, *CLIENT_COLUMNS)},
        token_offsets=np.cumsum([0, *map(len, times)], dtype=np.int64),
        token_times_ns=np.concatenate([*times, np.empty(0, np.int64)]),
        counters=dict(sorted(failures.items())),
        journal=None,
    )


def _row(one: Exchange, times_ns: NDArray[np.int64]) -> dict[str, Any]:
    """A request's columns. From outside, waiting and prefill are one."""
    timed, usage, ended = one.timed, one.usage, one.ended
    request = timed.request
    prompt = usage.prompt_tokens if usage is not None else None
    details = usage.prompt_tokens_details if usage is not None else None
    cached = details.cached_tokens if details is not None else None
    first, last = (int(times_ns[0]), int(times_ns[-1])) if len(times_ns) else (NEVER, NEVER)
    answered = first if first != NEVER else one.finish_ns
    return {
        "id": request.rid,
        "session": timed.session,
        "tenant": timed.tenant,
        "priority": NEVER if request.priority is None else request.priority,
        "arrival_ns": timed.arrival_ns,
        "queued_ns": NEVER,
        "first_scheduled_ns": NEVER,
        "first_token_ns": first,
        "last_token_ns": last,
        "finish_ns": one.finish_ns,
        "prompt_tokens": len(request.prompt) if prompt is None else prompt,
        "cached_tokens": NEVER if cached is None else cached,
        "output_tokens": len(times_ns),
        "max_new_tokens": NEVER if request.max_new_tokens is None else request.max_new_tokens,
        "finish_reason": str(one.finish_reason),
        "retractions": 0,
        "queue_ns": 0 if ended else NEVER,
        "prefill_ns": answered - timed.arrival_ns if ended else NEVER,
        "decode_ns": one.finish_ns - answered if ended else NEVER,
        "retracted_ns": 0 if ended else NEVER,
        "transfer_ns": 0 if ended else NEVER,
        "replica": 0,
        "sent_ns": one.sent_ns,
        "status": one.status,
        "failure": "" if one.failure is None else str(one.failure),
    }


def _column(name: str, values: list[Any]) -> Column:
    return values if name in TEXT_COLUMNS else np.array(values, dtype=np.int64)


def _interrupted(engine: Engine, driven: Driven) -> list[str]:
    if not driven.interrupted:
        return []
    ended = sum(one.ended for one in driven.exchanges)
    expected = engine.workload.expected_requests()
    of_all = f"{ended:,}" if expected is None else f"{ended:,} of {expected:,}"
    return [f"interrupted: {of_all} requests had ended, {len(driven.exchanges) - ended:,} were under way"]


def _notes(server: Server, exchanges: Sequence[Exchange], cpu: float) -> list[str]:
    return [*_failures(exchanges), *_slow_driver(exchanges, cpu), *_counting(exchanges, bool(server.tokenizer))]


def _failures(exchanges: Sequence[Exchange]) -> list[str]:
    """Each kind of failure: how many, and what the first of them said."""
    notes = []
    for kind in Failure:
        failed = [one for one in exchanges if one.failure is kind]
        if failed:
            words = f"the first, {failed[0].timed.request.rid}: {failed[0].message}"
            notes.append(f"{len(failed)} requests failed: {kind.replace('_', ' ')}; {words}")
    return notes


def _slow_driver(exchanges: Sequence[Exchange], cpu: float) -> list[str]:
    delays = [(one.sent_ns - one.timed.arrival_ns) / NS_PER_MS for one in exchanges if one.sent_ns != NEVER]
    late_ms = float(np.percentile(delays, 99)) if delays else 0.0
    notes = []
    if late_ms > LATE_MS:
        notes.append(f"the driver was late: p99 of the delay between schedule and sending is {late_ms:.1f} ms")
    if cpu > BUSY_CPU:
        notes.append(f"the driver took {100 * cpu:.0f} % of a core: it may be what was measured, not the server")
    return notes


def _counting(exchanges: Sequence[Exchange], as_text: bool) -> list[str]:
    """How tokens were counted where the server did not tell, and where it tells something else than was asked for."""
    whole = [one for one in exchanges if one.ended and one.failure is None]
    untold = sum(one.counted is Counted.CHUNKS and not (one.usage and one.usage.completion_tokens) for one in whole)
    spread = sum(one.spread for one in whole)
    other = sum(one.output_tokens != one.timed.output_tokens for one in whole)
    prompts = [
        (len(one.timed.request.prompt), one.usage.prompt_tokens)
        for one in whole
        if one.usage is not None and one.usage.prompt_tokens is not None
    ]
    sent, counted = (sum(column) for column in zip(*prompts, strict=True)) if prompts else (0, 0)
    no_ids = 0 if as_text else sum(bool(one.timed.session) and one.counted is not Counted.IDS for one in whole)
    notes = {
        f"{untold} answers: the server does not count tokens; each chunk was counted as one": untold,
        f"{spread} answers: only the end told how many tokens the chunks held; they are spread evenly": spread,
        f"{other} outputs have other lengths than the workload says": other,
        f"the server counted {counted:,} prompt tokens where {sent:,} were sent": sent != counted,
        f"{no_ids} turns of sessions: the server sent no token ids; the next turn has others in their place": no_ids,
    }
    return [note for note, holds in notes.items() if holds]


def _provenance(server: Server, seed: int) -> dict[str, Any]:
    """Where, when and with what; the command without the key."""
    made = api.provenance(seed) | {"aiohttp": version("aiohttp"), "uvloop": version("uvloop")}
    if server.api_key:
        made["command"] = made["command"].replace(server.api_key, "***")
    return made
