"""Recorded runs replay with every step equal; altered ones are refused, or reported at the right step.

Runs of every kind (``tests/study/recorded.py``): simulated with leaps, paced, real on the CPU, both loops, all batching
strategies, with retraction, aborts, chunking, prefix eviction, sessions, drawn tokens, interrupted ones. Each is saved,
read and replayed. Then runs are altered: single bytes of every file of a run folder (at full size every byte of it),
which must be refused by the file's name; and messages, lengths, stamps, tokens, ends and results of the journal with
all digests made anew, which must be refused or reported at the step that the decision log alone says
(``tests/study/alterations.py``), or, where no decision can differ, be found in the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from testbed.scenario.errors import InputError
from testbed.scheduler.decisions import read_decisions
from testbed.study.replay import replay
from tests.evidence.evidence import Evidence
from tests.study.alterations import REFUSED, Alteration, Subject, alterations, by_priority, subject
from tests.study.forging import flip, reseal
from tests.study.recorded import CASES, IN_A_PROCESS, Case, everything, happened

BYTES_OF_SMOKE = 400
LEAST_RUNS = 20
WANTED = {"retraction", "abort", "chunking", "eviction"}
"""What has to be among the runs."""


def check(smoke: bool) -> Evidence:
    """Replay all runs, then alter some."""
    cases = CASES if smoke else [*CASES, IN_A_PROCESS]
    with TemporaryDirectory() as folder:
        place = Path(folder)
        replayed = [_Replayed(case, place / str(number)) for number, case in enumerate(cases)]
        altered = [*_journals(place, smoke), *_priorities()]
        refused, bytes_altered, missed = _bytes(place / "bytes", smoke)
    steps, equal = sum(run.steps for run in replayed), sum(run.equal_steps for run in replayed)
    wrong = [line for line, right in altered if not right]
    seen = Counter(name for run in replayed for name in run.happened)
    lacking = sorted(WANTED - set(seen))
    whole = all(run.is_equal for run in replayed)
    return Evidence(
        figure=f"{len(replayed)} runs, {equal:,} of {steps:,} steps equal ({100 * equal / steps:g} %); "
        f"{refused:,} of {bytes_altered:,} altered bytes refused by the file's name; "
        f"{len(altered) - len(wrong)} of {len(altered)} altered journals refused or reported at the right step",
        bar=f"at least {LEAST_RUNS} runs, 100 % of steps, all alterations",
        passed=whole and len(replayed) >= LEAST_RUNS and not (lacking or wrong or missed),
        details=(
            *(f"{name} in {count} runs" for name, count in sorted(seen.items())),
            *(f"NOT EQUAL: {run.line}" for run in replayed if not run.is_equal),
            *(f"no run has {name}" for name in lacking),
            *missed[:20],
            *wrong[:20],
        ),
    )


class _Replayed:
    """One run, saved, read and replayed."""

    def __init__(self, case: Case, folder: Path) -> None:
        recorded = case.make()
        self.happened = happened(recorded)
        decisions = list(read_decisions(recorded.records.decisions))
        found = replay(recorded.save(folder))
        self.steps = len(decisions)
        self.equal_steps = self.steps if found.divergence is None else found.divergence.step
        same_records = all(
            np.array_equal(column, found.records.requests[name]) for name, column in recorded.records.requests.items()
        )
        same_log = found.records.decisions == recorded.records.decisions
        self.is_equal = found.equal and same_records and same_log
        self.line = f"{case.name}: {found.verdict()}"


def _journals(place: Path, smoke: bool) -> Iterator[tuple[str, bool]]:
    """(what was done, whether the answer was right) of altered journals, from folders with digests made anew."""
    for loop in ("normal", "overlap"):
        chosen = subject(loop)
        folder = chosen.run.save(place / loop)
        for alteration in list(alterations(chosen))[:: 10 if smoke else 1]:
            yield f"{loop}, {alteration.name}", _is_right(chosen, folder, alteration)


def _is_right(chosen: Subject, folder: Path, alteration: Alteration) -> bool:
    journal = alteration.journal
    (folder / "journal.bin").write_bytes(journal if isinstance(journal, bytes) else journal.to_bytes())
    reseal(folder)
    try:
        found = replay(folder)
    except InputError as error:
        return alteration.step == REFUSED and "journal.bin" in str(error)
    step = None if found.divergence is None else found.divergence.step
    return step == alteration.step and (step is not None or bool(found.differing) == alteration.records)


def _priorities() -> Iterator[tuple[str, bool]]:
    for changed in range(8):
        for priority in (0, 3, 10):
            forged, step = by_priority(changed, priority)
            divergence = replay(forged).divergence
            right = (None if divergence is None else divergence.step) == step
            yield f"request {changed} has priority {priority}", right


def _bytes(folder: Path, smoke: bool) -> tuple[int, int, list[str]]:
    """Bytes refused, bytes altered, and those that were not refused by the file's name."""
    everything(loop="overlap").save(folder)
    places = [(file, at) for file in sorted(folder.iterdir()) for at in range(file.stat().st_size)]
    chosen = places[:: max(len(places) // BYTES_OF_SMOKE, 1)] if smoke else places
    missed = []
    for number, (file, at) in enumerate(chosen):
        bits = 1 + number % 255
        flip(file, at, bits)
        try:
            replay(folder)
            missed.append(f"byte {at} of {file.name} may be another")
        except InputError as error:
            if file.name not in str(error):
                missed.append(f"byte {at} of {file.name}: {error}")
        flip(file, at, bits)
    return len(chosen) - len(missed), len(chosen), missed
