"""A run, altered by somebody who makes all digests anew: what was done to its journal, and at which step a replay must
say so.

The right step is worked out from the run alone: its decision log, the launches before each iteration, and what a
request asks for. It is the first step in which the altered request, row or iteration can matter. Nothing of it asks the
scheduler. The runs are made so that it is one step: memory and seats for all, first come first served, prefills first,
so that a request is prefilled in the iteration that brings it and decodes in every decode step until it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from testbed import Run
from testbed.batch import ForwardMode
from testbed.messages import AbortRequest, GenerateRequest, Message, Prompt, Segment
from testbed.metrics.journal import Journal
from testbed.scheduler.decisions import Decision, read_decisions
from testbed.tokens import oracle_key, stream_key
from testbed.workload.base import TimedRequest
from tests.properties.world import Job, Outcome, engine, run
from tests.study.recorded import QUICK, as_run

GONE = "f0"
"""The request that is aborted."""
ABORTED_AT = 9
PARENT, CHILD = "t0", "t1"
"""A request, and one whose prompt repeats the first one's prompt and answer."""


class Turn(Job):
    """A job whose prompt goes on with the answer to another one."""

    def timed(self) -> TimedRequest:
        """As a session's next turn."""
        timed = super().timed()
        assert isinstance(timed.request.prompt, Prompt)
        said = Segment(oracle_key(0, PARENT), 0, ANSWER)
        head = Segment(stream_key("prompt", PARENT), 0, 10)
        prompt = Prompt([head, said, *timed.request.prompt.segments])
        return timed._replace(request=msgspec.structs.replace(timed.request, prompt=prompt))


ANSWER = 7


class Subject(NamedTuple):
    """A run to be altered, and what its maker saw."""

    run: Run
    outcome: Outcome
    decisions: list[Decision]
    overlap: bool

    @property
    def journal(self) -> Journal:
        """A journal of its own, to be changed."""
        assert self.run.records.journal is not None
        return Journal.from_bytes(self.run.records.journal.to_bytes())

    def altered(self, journal: Journal) -> Run:
        """The run with another journal."""
        return Run(self.run.scenario, replace(self.run.records, journal=journal), dict(self.run.meta))

    # -- what can be read off the run, without a scheduler ------------------------------------------

    def first_step_of(self, iteration: int) -> int:
        """The first step launched in this iteration or later."""
        return self.outcome.moments[iteration].steps

    def rank(self, rid: str) -> int:
        """Its number in the log: all of them are accepted, in order."""
        order = [message.rid for message in requests(self.journal)]
        return order.index(rid)

    def prefill(self, rid: str) -> int:
        """The step of its prefill."""
        rank = self.rank(rid)
        return next(k for k, one in enumerate(self.decisions) if any(part[0] == rank for part in one.prefills))

    def decodes(self, rid: str) -> list[int]:
        """The steps in which it decodes."""
        rank = self.rank(rid)
        return [k for k, one in enumerate(self.decisions) if rank in one.decodes]

    def gone_after(self, rid: str, step: int, failed: bool = False) -> int | None:
        """It ends with the result of ``step``: the first step that should be another one.

        That is the next one that has it. The overlap loop launches one more before it looks at the result; if that one
        has a row of it, the row's page is given back at once, and pages are a stack: the step behind it takes that
        page. A failed row's page comes back likewise.
        """
        if failed or (self.overlap and step + 1 in self.decodes(rid)):
            return step + 1 + self.overlap
        return next((k for k in self.decodes(rid) if k > step + self.overlap), None)

    def kept_after(self, step: int) -> int:
        """It does not end with the result of ``step``: the first decode step behind it, which should have it, or one
        more behind the last (there is an iteration after it, in which a request that goes on would be launched)."""
        modes = enumerate(self.decisions)
        later = (k for k, one in modes if k > step + self.overlap and one.mode is ForwardMode.DECODE)
        return next(later, len(self.decisions))


def subject(loop: str) -> Subject:
    """A paced run, so that the journal keeps its tokens; requests come at chosen iterations."""
    jobs: list[Job] = [
        Job("a0", (("a", 20), ("a0", 3)), 12, iteration=0),
        Job("b0", (("b0", 9),), 30, iteration=2),
        Job("a1", (("a", 20), ("a1", 8)), 6, iteration=5),
        Job(GONE, (("f", 13),), 28, iteration=6),
        Job("e0", (("e0", 11),), 8, 25, iteration=8),
        Job(PARENT, ((PARENT, 10),), ANSWER, iteration=10),
        Job("c0", (("c", 17),), 9, iteration=13),
        Turn(CHILD, (("more", 5),), 5, iteration=30),
        Job("last", (("last", 21),), 14, iteration=33),
    ]
    script: dict[int, list[Message]] = {ABORTED_AT: [AbortRequest(GONE)]}
    outcome = run(engine(loop=loop), jobs, device=QUICK, script=script, paced=True, prove=False)
    return Subject(as_run(outcome), outcome, list(read_decisions(outcome.records.decisions)), loop == "overlap")


def requests(journal: Journal) -> list[GenerateRequest]:
    """Every request in the journal, in order."""
    return [message for _, message in journal.arrivals if isinstance(message, GenerateRequest)]


REFUSED = -1
"""In place of a step: the journal is no journal any more."""


class Alteration(NamedTuple):
    """An altered journal and what must be said of it."""

    name: str
    journal: Journal | bytes
    step: int | None
    """The step to be named; None: no decision can differ; REFUSED."""
    records: bool = False
    """Whether records must differ, where no decision does."""


def alterations(subject: Subject) -> Iterator[Alteration]:
    """Everything that is done to a run."""
    for parts in (_messages, _lengths, _times, _tokens, _ends, _cuts):
        yield from parts(subject)


# -- messages ------------------------------------------------------------------------------------------


def _place(journal: Journal, rid: str) -> int:
    found = (k for k, (_, m) in enumerate(journal.arrivals) if isinstance(m, GenerateRequest) and m.rid == rid)
    return next(found)


def _with(journal: Journal, rid: str, /, **fields: Any) -> Journal:
    """Another message in place of a request's."""
    place = _place(journal, rid)
    iteration, message = journal.arrivals[place]
    journal.arrivals[place] = (iteration, msgspec.structs.replace(message, **fields))
    return journal


def _moved(journal: Journal, place: int, iteration: int) -> Journal:
    _, message = journal.arrivals.pop(place)
    behind = sum(at <= iteration for at, _ in journal.arrivals)
    journal.arrivals.insert(behind, (iteration, message))
    return journal


def _messages(subject: Subject) -> Iterator[Alteration]:
    for rid in [request.rid for request in requests(subject.journal)]:
        prefill = subject.prefill(rid)
        journal = subject.journal
        del journal.arrivals[_place(journal, rid)]
        yield Alteration(f"{rid} dropped", journal, prefill)
        for tokens in (1, 400):
            longer = Prompt([Segment(1, 0, tokens)])
            yield Alteration(f"{rid}'s prompt has {tokens} tokens", _with(subject.journal, rid, prompt=longer), prefill)
        place = _place(subject.journal, rid)
        came = subject.journal.arrivals[place][0]
        if came:  # at 0 nobody else runs, and all would only happen an iteration later
            yield Alteration(f"{rid} comes later", _moved(subject.journal, place, came + 1), prefill)
            earlier = subject.first_step_of(came - 1)
            yield Alteration(f"{rid} comes earlier", _moved(subject.journal, place, came - 1), earlier)
        renamed = _with(subject.journal, rid, rid="somebody else")
        aborted = {GONE: subject.first_step_of(ABORTED_AT)}  # then the abort finds nobody
        yield Alteration(f"{rid} is called otherwise", renamed, aborted.get(rid), records=True)
        yield Alteration(
            f"{rid} is important, where nothing heeds it", _with(subject.journal, rid, priority=7), None, True
        )
    other = Prompt([Segment(99, 0, 23)])
    yield Alteration("a0 asks something else", _with(subject.journal, "a0", prompt=other), subject.prefill("a1"))
    other = Prompt([Segment(99, 0, 28)])
    yield Alteration("a1 asks something else", _with(subject.journal, "a1", prompt=other), subject.prefill("a1"))
    other = Prompt([Segment(99, 0, 17)])
    yield Alteration("c0 asks something else, which nobody repeats", _with(subject.journal, "c0", prompt=other), None)
    yield Alteration("a1 is of another tenant", _with(subject.journal, "a1", extra_key="x"), subject.prefill("a1"))
    journal = subject.journal
    abort = next(k for k, (_, m) in enumerate(journal.arrivals) if isinstance(m, AbortRequest))
    journal.arrivals.pop(abort)
    yield Alteration("the abort is dropped", journal, subject.first_step_of(ABORTED_AT))
    journal = _moved(subject.journal, abort, ABORTED_AT + 2)
    yield Alteration("the abort comes later", journal, subject.first_step_of(ABORTED_AT))
    journal = subject.journal
    journal.arrivals.insert(abort, (ABORTED_AT, AbortRequest("b0")))
    first = next(k for k in subject.decodes("b0") if k >= subject.first_step_of(ABORTED_AT))
    yield Alteration("b0 is aborted too", journal, first)
    journal = subject.journal
    journal.arrivals.insert(abort, (ABORTED_AT, AbortRequest("nobody")))
    yield Alteration("an abort of nobody", journal, None)


def _lengths(subject: Subject) -> Iterator[Alteration]:
    """``max_new_tokens``: token k + 1 of a request comes with its k-th decode step."""
    for rid, outputs in (("a0", 12), ("b0", 30), ("c0", 9), ("last", 14)):
        steps = [subject.prefill(rid), *subject.decodes(rid)]
        for fewer in (1, 2, outputs // 2, outputs - 2):
            journal = _with(subject.journal, rid, max_new_tokens=fewer)
            yield Alteration(f"{rid} gets {fewer} tokens", journal, subject.gone_after(rid, steps[fewer - 1]))
        step = subject.kept_after(steps[outputs - 1])
        yield Alteration(f"{rid} gets more tokens", _with(subject.journal, rid, max_new_tokens=200), step, records=True)
    early = _with(subject.journal, "e0", max_new_tokens=20)
    yield Alteration("e0, which stops by itself, may have less", early, None, records=True)


# -- stamps and results ----------------------------------------------------------------------------------


def _times(subject: Subject) -> Iterator[Alteration]:
    """No decision looks at a time here; a request's record has the stamps of its receipt, its first step (the same
    here) and its abort."""
    stamps = subject.journal.stamps
    kept = {at for at, _ in subject.journal.arrivals}
    for at in range(1, len(stamps) - 1):
        journal = subject.journal
        journal.stamps[at] = (stamps[at] + stamps[at + 1]) // 2
        differs = journal.stamps[at] != stamps[at] and at in kept
        yield Alteration(f"stamp {at} is later", journal, None, records=differs)
    backwards = subject.journal
    backwards.stamps[5] = stamps[4] - 1
    yield Alteration("time goes back", backwards.to_bytes(), REFUSED)
    later = subject.journal
    later.sent[subject.decodes("last")[12]] += 1
    yield Alteration("the last token is sent later", later, None, records=True)


def _tokens(subject: Subject) -> Iterator[Alteration]:
    """A token matters where somebody's prompt repeats it; the last one of an answer is in nobody's cache."""
    child = subject.prefill(CHILD)
    steps = [subject.prefill(PARENT), *subject.decodes(PARENT)]
    for number, step in enumerate(steps[:ANSWER]):
        matters = number < ANSWER - 1
        yield Alteration(f"token {number} of {PARENT}", _other_token(subject, PARENT, step), child if matters else None)
    for rid in ("b0", "last"):
        for step in subject.decodes(rid)[:4]:
            yield Alteration(f"a token of {rid}, which nobody repeats", _other_token(subject, rid, step), None)


def _row(subject: Subject, rid: str, step: int) -> int:
    decision, rank = subject.decisions[step], subject.rank(rid)
    return [*(part[0] for part in decision.prefills), *decision.decodes].index(rank)


def _other_token(subject: Subject, rid: str, step: int) -> Journal:
    journal = subject.journal
    tokens = journal.tokens[step].copy()
    tokens[_row(subject, rid, step)] ^= 1
    journal.tokens[step] = tokens
    return journal


def _ends(subject: Subject) -> Iterator[Alteration]:
    """Early ends by result, added and taken away."""
    for rid in ("b0", "c0", "last"):
        for step in subject.decodes(rid)[:-3:2]:
            journal = subject.journal
            rows = {**journal.stopped, step: (*journal.stopped.get(step, ()), _row(subject, rid, step))}
            journal.stopped = dict(sorted(rows.items()))
            yield Alteration(f"{rid} stops at step {step}", journal, subject.gone_after(rid, step))
            journal = subject.journal
            journal.invalid = {step: (_row(subject, rid, step),)}
            yield Alteration(f"{rid} has no token at step {step}", journal, subject.gone_after(rid, step, failed=True))
    (step,) = subject.journal.stopped
    journal = subject.journal
    journal.stopped = {}
    yield Alteration("e0 does not stop", journal, subject.kept_after(step))
    journal = subject.journal
    journal.stopped = {step: (17,)}
    yield Alteration("a row stops that is not there", journal, step)
    journal = subject.journal
    journal.stopped = {10**6: (0,)}
    yield Alteration("a step stops that is not there", journal.to_bytes(), REFUSED)


def _cuts(subject: Subject) -> Iterator[Alteration]:
    """Something is missing."""
    whole = subject.journal
    last = len(whole.sent) - 1
    journal = deepcopy(whole)
    journal.sent.pop()
    journal.tokens.pop()
    yield Alteration("the last result is missing", journal, last)
    rows = [len(tokens) for tokens in whole.tokens]
    for step in range(0, last, 5):
        journal = deepcopy(whole)
        journal.sent.pop(step)
        del journal.tokens[step]
        first = next((k for k in range(step, last) if rows[k + 1] != rows[k]), last)
        stopped = next(iter(whole.stopped))
        if step <= stopped:  # its row ends at the result that has moved under it
            continue
        yield Alteration(f"result {step} is missing", journal, first)
    for iteration in range(4, len(whole.stamps), 4):
        journal = deepcopy(whole)
        journal.stamps = journal.stamps[:iteration]
        journal.arrivals = [(at, message) for at, message in journal.arrivals if at < iteration]
        step = subject.first_step_of(iteration)
        if step < len(subject.decisions):
            yield Alteration(f"it ends before iteration {iteration}", journal, step)
        else:  # all is launched; in the overlap loop the last result was looked at in the iteration that is missing
            yield Alteration(f"it ends before iteration {iteration}", journal, None, records=subject.overlap)
    data = whole.to_bytes()
    for size in (3, 6, len(data) // 2, len(data) - 1):
        yield Alteration(f"it is cut off at byte {size}", data[:size], REFUSED)
    messages = deepcopy(whole)
    messages.stamps = messages.stamps[:20]
    yield Alteration("its messages come after its end", messages.to_bytes(), REFUSED)


# -- whose turn it is -----------------------------------------------------------------------------------


def by_priority(changed: int, priority: int) -> tuple[Run, int | None]:
    """A run of one request at a time, most important first, and the step that must be named when ``changed`` had
    another priority all along: the prefill of the first place in the order that somebody else has."""
    priorities = [3, 1, 4, 1, 5, 9, 2, 6]
    jobs = [Job(f"p{i}", ((f"p{i}", 6 + i),), 3, iteration=0, priority=each) for i, each in enumerate(priorities)]
    outcome = run(engine(loop="normal", priority=True, max_running_requests=1), jobs, device=QUICK, paced=True)
    before = _order(priorities)
    assert [part[0] for one in read_decisions(outcome.records.decisions) for part in one.prefills] == before
    after = _order([priority if i == changed else each for i, each in enumerate(priorities)])
    place = next((k for k, (one, other) in enumerate(zip(before, after, strict=True)) if one != other), None)
    whole = as_run(outcome)
    journal = whole.records.journal
    assert journal is not None
    altered = _with(Journal.from_bytes(journal.to_bytes()), f"p{changed}", priority=priority)
    prefills = [k for k, one in enumerate(read_decisions(outcome.records.decisions)) if one.prefills]
    forged = Run(whole.scenario, replace(whole.records, journal=altered), {})
    return forged, None if place is None else prefills[place]


def _order(priorities: Sequence[int]) -> list[int]:
    return sorted(range(len(priorities)), key=lambda i: (-priorities[i], i))
