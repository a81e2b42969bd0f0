"""The smallest world a workload can live in: everything takes a fixed time, outputs are the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.scenario.workload import WorkloadConfig
from testbed.tokens import oracle_key, token_ids
from testbed.workload import TimedRequest, Workload, build_workload

VOCAB = 32_000
SECOND_NS = 1_000_000_000


def build(
    config: dict[str, Any], *, seed: int = 0, context_length: int = 131_072, base_dir: Path | None = None
) -> Workload:
    return build_workload(
        WorkloadConfig.model_validate(config),
        seed=seed,
        context_length=context_length,
        vocab_size=VOCAB,
        base_dir=base_dir or Path(),
    )


def oracle(timed: TimedRequest, seed: int = 0) -> NDArray[np.int32]:
    return token_ids(oracle_key(seed, timed.request.rid), 0, timed.output_tokens, VOCAB)


def serve(
    workload: Workload,
    service_ns: Callable[[TimedRequest], int] = lambda _: SECOND_NS,
    output: Callable[[TimedRequest], NDArray[np.int32]] = oracle,
) -> list[tuple[TimedRequest, int]]:
    """Serve everything with unlimited servers, reading ``start()`` one ahead: (request, end in ns) as sent."""
    stream = workload.start()
    upcoming = next(stream, None)
    answers: list[tuple[int, int, TimedRequest]] = []
    running: list[tuple[int, int, TimedRequest]] = []
    served: list[tuple[TimedRequest, int]] = []
    ticket, now_ns, last_start_ns = 0, 0, 0
    while upcoming is not None or answers or running:
        times = [upcoming.arrival_ns if upcoming else None, answers[0][0] if answers else None]
        soonest = min((each for each in times if each is not None), default=None)
        if running and (soonest is None or running[0][0] <= soonest):
            now_ns, _, done = heappop(running)
            for timed in workload.on_finish(done.request.rid, now_ns, output(done)):
                assert timed.arrival_ns >= now_ns
                ticket += 1
                heappush(answers, (timed.arrival_ns, ticket, timed))
            continue
        if upcoming is not None and upcoming.arrival_ns == soonest:
            timed = upcoming
            assert timed.arrival_ns >= last_start_ns
            last_start_ns = timed.arrival_ns
            upcoming = next(stream, None)
        else:
            timed = heappop(answers)[2]
        ticket += 1
        end_ns = timed.arrival_ns + service_ns(timed)
        heappush(running, (end_ns, ticket, timed))
        served.append((timed, end_ns))
    return served
