"""Things that can be wrong between a simulation and a run, put in one at a time, and what ``confirm`` must call them.

The run is paced: loop, clock and host are real, the device is modelled. Its host spins for a named profile that is
slower than any machine the tests meet, so that the host's time is known; arrivals are tied to iterations, so that the
decisions are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from testbed import api, load_scenario
from testbed.batch import Batch, StepResult
from testbed.metrics.run import Run
from testbed.ports import Stage
from testbed.request import Request
from testbed.runtime.oracle import Oracle
from testbed.runtime.paced import PacedDevice
from testbed.runtime.wall import Work
from testbed.scenario.schema import Scenario
from testbed.scheduler.policies import POLICIES
from testbed.scheduler.scheduler import Scheduler
from testbed.study.confirm.findings import PROFILES, Finding
from testbed.study.confirm.run import Confirmation, confirm
from testbed.tokens import oracle_key, token_ids

DECODE_NS = 1_200_000
STAGE_US = 100
"""What every stage of the host takes; ``PROCESS`` twice that."""
VICTIM = "r3"
DROPPED = 5
"""Position of the token that a faulty executor drops."""


def device(decode_ns: int = DECODE_NS) -> dict[str, Any]:
    times = {"prefill_ns": 800_000, "prefill_token_ns": 2_000, "decode_ns": decode_ns, "decode_row_ns": 20_000}
    return {"constant": times}


def host_file(folder: Path, name: str, process_us: int = 2 * STAGE_US) -> str:
    """A host profile in a file."""
    stages = {stage.name.lower(): STAGE_US for stage in Stage} | {"process": process_us}
    lines = [f"  {stage}: {{fixed_us: [{cost}, measured, made up]}}" for stage, cost in stages.items()]
    path = folder / f"{name}.yaml"
    path.write_text("\n".join([f"name: {name}", "stages:", *lines, "launch: {}", ""]), encoding="utf-8")
    return str(path)


def scenario(folder: Path, count: int = 16, **fields: Any) -> Scenario:
    """Requests that press on memory: the estimate of output and retractions decide who runs."""
    host = host_file(folder, "slow")
    lengths = {
        "prompt_tokens": {"kind": "uniform", "low": 20, "high": 60},
        "output_tokens": {"kind": "uniform", "low": 10, "high": 40},
    }
    content = {
        "name": "mutants",
        "model": "qwen3-0.6b",
        "device": device(),
        "host": host,
        "host_inject": host,
        "engine": {
            "kv_tokens": 400,
            "init_new_token_ratio": 0.45,
            "policy": "lof",
            "loop": "overlap",
            "chunked_prefill_size": 64,
            "max_running_requests": 8,
        },
        "workload": {
            "arrivals": {"kind": "at_iteration", "every": 2},
            "lengths": lengths,
            "count": count,
            "max_new_tokens": 64,
        },
        **fields,
    }
    return load_scenario(content).scenario


Execute = Callable[[str, Scenario], Run]


class Mutant(NamedTuple):
    """What is wrong, and how it must be called."""

    simulated: Callable[[Path, Scenario], Scenario]
    """The scenario as it is simulated and priced."""
    execute: Callable[[Scenario], Execute]
    """How the true scenario is run."""
    cause: str
    """Of the finding that names it; '' where no cause may be found."""
    place: str
    """What its place begins with."""
    factor: float | None = None
    """Predicted over true time, where a profile is wrong."""


def called(mutant: Mutant, findings: list[Finding]) -> Finding | None:
    """The finding that names the mutant; None: it is not named. What is wrong with a run comes first of all findings; a
    wrong profile may stand behind a stage that a busy machine has stretched."""
    for finding in findings if mutant.cause in PROFILES else findings[:1]:
        if finding.cause == mutant.cause and finding.place.startswith(mutant.place):
            return finding
    return None


def same(folder: Path, true: Scenario) -> Scenario:
    return true


def truly(true: Scenario) -> Execute:
    """Run the true scenario, whatever was simulated."""
    return lambda name, _: api.execute(true, paced=True)


def with_fields(**fields: Any) -> Callable[[Path, Scenario], Scenario]:
    return lambda folder, true: load_scenario({**api.resolve(true), **fields}).scenario


def slow_process(folder: Path, true: Scenario) -> Scenario:
    return load_scenario({**api.resolve(true), "host": host_file(folder, "wrong", 20 * STAGE_US)}).scenario


def patched(mutation: Callable[[], Any], true: Scenario) -> Execute:
    """Run with a mutated program, during the run only."""

    def execute(name: str, _: Scenario) -> Run:
        with mutation():
            return api.execute(true, paced=True)

    return execute


# -- mutated schedulers ------------------------------------------------------------------------------------------------


@contextmanager
def scheduler_with(change: Callable[[Scheduler], None]) -> Iterator[None]:
    """Every scheduler that is made is changed."""
    made = Scheduler.__init__

    def changed(self: Scheduler, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        change(self)

    with patch.object(Scheduler, "__init__", changed):
        yield


def less_conservative(scheduler: Scheduler) -> None:
    """As with schedule_conservativeness 0.3."""
    scheduler.new_token_ratio = scheduler.ratio_init = 0.3 * scheduler.ratio_init


def faster_decay(scheduler: Scheduler) -> None:
    scheduler.ratio_decay *= 20


@contextmanager
def other_tie_break() -> Iterator[None]:
    """Of requests that are told the same limit, the last to come goes first."""

    def lof(waiting: list[Request], scheduler: Scheduler) -> None:
        waiting.sort(key=lambda request: (-request.max_new_tokens, -request.rank))

    with patch.dict(POLICIES, lof=lof):
        yield


# -- mutated executors -------------------------------------------------------------------------------------------------


@contextmanager
def executor_with(change: Callable[[Batch, StepResult, int, int], StepResult]) -> Iterator[None]:
    """``change(batch, result, row, position)`` is asked of every decode row of ``VICTIM``; ``position`` is its token's
    (right as long as nothing retracts it)."""

    class Faulty(PacedDevice):
        def __init__(self, clock: Any, cost_model: Any, oracle: Oracle) -> None:
            super().__init__(clock, cost_model, oracle)
            self.position = 0

        def work(self, batch: Batch, defer_sampling: bool, after: object = None) -> Work:
            work = super().work(batch, defer_sampling)
            for row, request in enumerate(batch.decodes, start=len(batch.prefills)):
                if request.rid == VICTIM:
                    self.position += 1
                    work._result = change(batch, work._result, row, self.position)  # type: ignore[attr-defined]
            return work

    with patch.object(api, "PacedDevice", Faulty):
        yield


def drops_a_token(batch: Batch, result: StepResult, row: int, position: int) -> StepResult:
    """From one position on, the tokens are those of the next position."""
    if position < DROPPED:
        return result
    token_id = token_ids(oracle_key(0, VICTIM), position + 1, 1, 151_936)[0]
    changed: np.ndarray[Any, np.dtype[np.int32]] = result.token_ids.copy()
    changed[row] = token_id
    return result._replace(token_ids=changed)


def ends_early(batch: Batch, result: StepResult, row: int, position: int) -> StepResult:
    return result._replace(stopped=(*result.stopped, row)) if position == DROPPED else result


def gives_no_token(batch: Batch, result: StepResult, row: int, position: int) -> StepResult:
    return result._replace(invalid=(row,)) if position == DROPPED else result


MUTANTS = {
    "nothing": Mutant(same, truly, "", ""),
    "decode priced twice": Mutant(
        with_fields(device=device(2 * DECODE_NS)), truly, "device profile", "decode, graph", 2.0
    ),
    "one host stage priced ten times": Mutant(slow_process, truly, "host profile", "process", 10.0),
    "schedule_conservativeness": Mutant(
        same, partial(patched, partial(scheduler_with, less_conservative)), "scheduler", "run 1, step"
    ),
    "decay of the new-token ratio": Mutant(
        same, partial(patched, partial(scheduler_with, faster_decay)), "scheduler", "run 1, step"
    ),
    "tie-break of the policy": Mutant(same, partial(patched, other_tie_break), "scheduler", "run 1, step"),
    "a token is dropped": Mutant(
        same, partial(patched, partial(executor_with, drops_a_token)), "executor", f"wrong token, {VICTIM}"
    ),
    "a request ends early": Mutant(
        same, partial(patched, partial(executor_with, ends_early)), "executor", f"length, {VICTIM}"
    ),
    "a row has no token": Mutant(
        same, partial(patched, partial(executor_with, gives_no_token)), "executor", f"no token, {VICTIM}"
    ),
}


def confirmed(mutant: Mutant, folder: Path, count: int = 16) -> Confirmation:
    """What ``confirm`` says of a mutant."""
    true = scenario(folder, count)
    return confirm("mutants", {"one": mutant.simulated(folder, true)}, mutant.execute(true))
