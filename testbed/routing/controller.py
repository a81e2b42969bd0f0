"""The router: whom each message of a client concerns, and one answer for a question that was asked of all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from testbed.messages import (
    AbortRequest,
    BatchGenerateRequest,
    ControlOutput,
    GenerateRequest,
    LoadReport,
    Message,
)
from testbed.routing.policies import RoutingPolicy
from testbed.routing.replica import Replica
from testbed.scenario.errors import InputError


class Removed(NamedTuple):
    """What a removed replica leaves behind."""

    requests: list[GenerateRequest]
    """They have not ended: to be submitted again."""
    answers: list[ControlOutput]
    """Questions that waited for its answer only."""


class _Open:
    """A request that has not ended."""

    __slots__ = ("prompt_tokens", "replica", "request", "times")

    def __init__(self, replica: Replica, request: GenerateRequest) -> None:
        self.replica = replica
        self.request = request
        self.prompt_tokens = len(request.prompt)
        self.times = 1
        """How often a request with this id was sent: each of them ends, the second by a refusal."""


class _Question:
    """A control message, and the answers to it."""

    def __init__(self, message: Message, asked: Iterable[int]) -> None:
        self.message = message
        self.waits_for = dict.fromkeys(asked)
        self.answers: dict[int, ControlOutput] = {}


class Controller:
    """Spreads requests over replicas and keeps who has which. It sees what was sent, what was reported and which ends
    were heard: nothing else.

    The caller carries messages to the replicas, to each in the order in which it was told, and the answers back: those
    of a removed replica it drops.
    """

    def __init__(self, replicas: int, policy: RoutingPolicy, *, hears_ends: bool = False) -> None:
        """``hears_ends``: whether ``ended`` tells the policy anything, or the next report only."""
        self._policy = policy
        self._hears_ends = hears_ends
        self._replicas: dict[int, Replica] = {}
        self._taking: tuple[Replica, ...] = ()
        self._open: dict[str, _Open] = {}
        self._questions: list[_Question] = []
        self._next_index = 0
        for _ in range(replicas):
            self.add()

    # -- what clients send --------------------------------------------------------------------------------------------

    def route(self, message: Message) -> list[tuple[int, Message]]:
        """What to send to which replica. A batch is split, one decision a request; an abort goes to who has the request
        (unknown ids to nobody); everything else goes to all."""
        if isinstance(message, GenerateRequest):
            return [(self.submit(message), message)]
        if isinstance(message, BatchGenerateRequest):
            parts: dict[int, list[GenerateRequest]] = {}
            for request in message.requests:
                parts.setdefault(self.submit(request), []).append(request)
            return [(index, BatchGenerateRequest(tuple(part))) for index, part in parts.items()]
        if isinstance(message, AbortRequest):
            if message.abort_all:
                return [(index, message) for index in self._replicas]
            known = self._open.get(message.rid)
            return [] if known is None else [(known.replica.index, message)]
        self._questions.append(_Question(message, self._replicas))
        return [(index, message) for index in self._replicas]

    def submit(self, request: GenerateRequest) -> int:
        """The index of the replica that gets ``request``. An id that is open goes to where it is, to be refused there.
        Raises InputError when a user's own policy chooses a replica that takes no requests."""
        known = self._open.get(request.rid)
        if known is None:
            known = self._open[request.rid] = _Open(self._choose(request), request)
        else:
            known.times += 1
        known.replica.sent(known.prompt_tokens)
        return known.replica.index

    def _choose(self, request: GenerateRequest) -> Replica:
        """A request that names a replica goes there while it takes requests."""
        if request.data_parallel_rank is not None:
            named = self._replicas.get(request.data_parallel_rank)
            if named is not None and not named.draining:
                return named
        index = self._policy.choose(request, self._taking)
        chosen = self._replicas.get(index) if isinstance(index, (int, np.integer)) else None
        if chosen is None or chosen.draining:
            raise InputError(
                f"the routing policy chose {index!r}, which is no replica that takes requests",
                where="routing.policy",
                remedy="return the index of one of the replicas that choose() is given",
            )
        return chosen

    # -- what replicas say --------------------------------------------------------------------------------------------

    def reported(self, replica: int, report: LoadReport) -> None:
        """A report has come. No effect for a replica that was removed."""
        if replica in self._replicas:
            self._replicas[replica].reported(report)

    def ended(self, rid: str) -> None:
        """The end of a request has gone to its client. No effect for an id that is not open."""
        known = self._open.get(rid)
        if known is None:
            return
        known.times -= 1
        if known.times == 0:
            del self._open[rid]
        if self._hears_ends:
            known.replica.ended(known.prompt_tokens)

    def answered(self, replica: int, answer: ControlOutput) -> ControlOutput | None:
        """The joined answer, once every replica that was asked has answered. Each answers in the order of asking."""
        for question in self._questions:
            if replica in question.waits_for:
                del question.waits_for[replica]
                question.answers[replica] = answer
                return self._join(question)
        return None

    def _join(self, question: _Question) -> ControlOutput | None:
        """Success where all had success; every replica's state, its names behind its index."""
        if question.waits_for:
            return None
        self._questions.remove(question)
        answers = sorted(question.answers.items())
        failures = [f"replica {index}: {answer.message}" for index, answer in answers if not answer.success]
        state = {f"{index}.{name}": value for index, answer in answers for name, value in answer.state.items()}
        return ControlOutput(question.message, not failures, "; ".join(failures), state)

    # -- replicas that come and go ------------------------------------------------------------------------------------

    def add(self) -> int:
        """The index of a new replica, which has received nothing yet. Indices are not used again."""
        replica = Replica(self._next_index)
        self._next_index += 1
        self._replicas[replica.index] = replica
        self._taking = (*self._taking, replica)
        return replica.index

    def drain(self, replica: int) -> None:
        """It gets no more requests, and may be removed without loss once ``open_at`` is empty. Raises InputError for
        one that is not there, and for the last that takes requests."""
        self._stop_sending(self._find(replica))

    def remove(self, replica: int) -> Removed:
        """It is gone, at once. What it had is returned, nothing of it is open any more: submit it again. Raises
        InputError as ``drain``."""
        gone = self._find(replica)
        self._stop_sending(gone)
        del self._replicas[replica]
        left = self.open_at(replica)
        for request in left:
            del self._open[request.rid]
        for question in self._questions:
            question.waits_for.pop(replica, None)
        joined = [self._join(question) for question in list(self._questions)]
        return Removed(left, [answer for answer in joined if answer is not None])

    def open_at(self, replica: int) -> list[GenerateRequest]:
        """The requests that it was sent and that have not ended, in the order of sending."""
        return [known.request for known in self._open.values() if known.replica.index == replica]

    def _find(self, replica: int) -> Replica:
        if replica not in self._replicas:
            known = ", ".join(map(str, self._replicas))
            raise InputError(f"there is no replica {replica}", where="replica", remedy=f"there are: {known}")
        return self._replicas[replica]

    def _stop_sending(self, replica: Replica) -> None:
        rest = tuple(other for other in self._taking if other is not replica)
        if not rest:
            raise InputError(f"replica {replica.index} is the last", where="replica", remedy="add another one first")
        replica.draining = True
        self._taking = rest
