"""What is sent, apart from when: requests of their own, rows of a file, or sessions of several turns.

Contents are drawn in the order in which requests (or sessions) are opened, never in the order in which they end, so
two schedulers under comparison are asked for the same things.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from testbed.messages import Prompt, Segment, TokenPrompt
from testbed.scenario.workload import Fixed, Lengths, Sessions
from testbed.tokens import stream_key
from testbed.workload.base import TimedRequest
from testbed.workload.draw import Uniforms, values
from testbed.workload.lengths import length_draws, quantiles_of, token_draws
from testbed.workload.prompts import SharedPrefixes, cut, followed_by, fresh, merged, said
from testbed.workload.terms import Terms
from testbed.workload.traces.rows import SECOND_NS


class Contents(Protocol):
    """A source of requests that are sent when somebody else says so."""

    def open(self, arrival_ns: int, iteration: int = -1) -> TimedRequest | None:
        """The next request of its own, or first turn of a session; None when there is nothing left."""
        ...

    def reply(self, rid: str, now_ns: int, output_ids: NDArray[np.int32]) -> TimedRequest | None:
        """What follows the end of ``rid`` within its session; None when nothing does."""
        ...

    def notes(self) -> list[str]:
        """What was cut or left out."""
        ...


class SingleRequests:
    """Requests that know nothing of each other, but for a prefix they may share."""

    def __init__(self, lengths: Iterator[tuple[int, int]], prefixes: SharedPrefixes | None, terms: Terms, seed: int):
        self._lengths = lengths
        self._prefixes = prefixes
        self._terms = terms
        self._seed = seed
        self._numbers = count()
        self._cut = 0

    def open(self, arrival_ns: int, iteration: int = -1) -> TimedRequest | None:
        """See ``Contents``."""
        prompt_tokens, output_tokens = next(self._lengths)
        rid = f"r{next(self._numbers)}"
        segments = self._prefixes.draw() if self._prefixes else []
        total = prompt_tokens + sum(segment.length for segment in segments)
        segments.append(fresh(self._seed, rid, prompt_tokens))
        if not self._terms.fits(total, output_tokens):
            self._cut += 1
            total, output_tokens = self._terms.fitted(total, output_tokens)
            segments = cut(segments, total)
        return self._terms.request(arrival_ns, rid, Prompt(segments), output_tokens, iteration=iteration)

    def reply(self, rid: str, now_ns: int, output_ids: NDArray[np.int32]) -> TimedRequest | None:
        """Nothing follows."""
        return None

    def notes(self) -> list[str]:
        """See ``Contents``."""
        return cut_note(self._cut, self._terms)


def cut_note(requests: int, terms: Terms) -> list[str]:
    """How many drawn requests did not fit the context."""
    if not requests:
        return []
    return [f"{requests} drawn requests were longer than {terms.limit} and were cut"]


class _Turn(NamedTuple):
    user_tokens: int
    output_tokens: int
    think_ns: int
    """Pause before this turn."""


@dataclass(slots=True)
class _Session:
    name: str
    turns: deque[_Turn]
    """Still to come."""
    number: int = 0
    prompt: Prompt | TokenPrompt = Prompt(())  # noqa: RUF009 (immutable)


class SessionRequests:
    """Conversations, each turn repeating all that was said before it."""

    def __init__(
        self,
        config: Sessions,
        lengths: Lengths,
        prefixes: SharedPrefixes | None,
        terms: Terms,
        seed: int,
        vocab_size: int,
        base_dir: Path,
    ):
        self._lengths = length_draws(lengths, seed, base_dir)
        self._turns = token_draws(config.turns, seed, "session turns", base_dir)
        self._thinks = values(quantiles_of(config.think_s, base_dir), Uniforms(seed, "session think"))
        self._user: Iterator[int] | None = None
        if config.user_tokens is not None:
            self._user = token_draws(config.user_tokens, seed, "user lengths", base_dir, "prompt_tokens")
        self._system = Segment(stream_key("system", seed), 0, config.system_tokens)
        self._prefixes = prefixes
        self._terms = terms
        self._seed = seed
        self._vocab_size = vocab_size
        self._numbers = count()
        self._live: dict[str, _Session] = {}
        self._cut = self._full = self._broken = 0

    def open(self, arrival_ns: int, iteration: int = -1) -> TimedRequest | None:
        """See ``Contents``."""
        session = _Session(f"s{next(self._numbers)}", deque(self._plan()))
        turn = session.turns.popleft()
        prefix = self._prefixes.draw() if self._prefixes else []
        segments = [self._system, *prefix, fresh(self._seed, f"{session.name}.t0", turn.user_tokens)]
        total, output_tokens = sum(segment.length for segment in segments), turn.output_tokens
        if not self._terms.fits(total, output_tokens):
            self._cut += 1
            total, output_tokens = self._terms.fitted(total, output_tokens)
            segments = cut(segments, total)
        session.prompt = Prompt(merged(segments))
        return self._send(session, arrival_ns, output_tokens)

    def reply(self, rid: str, now_ns: int, output_ids: NDArray[np.int32]) -> TimedRequest | None:
        """The next turn, unless the session is over, its context is full, or the turn produced nothing."""
        session = self._live.pop(rid, None)
        if session is None or not session.turns:
            return None
        if len(output_ids) == 0:
            self._broken += len(session.turns)
            return None
        turn = session.turns.popleft()
        if not self._terms.fits(len(session.prompt) + len(output_ids) + turn.user_tokens, turn.output_tokens):
            self._full += 1 + len(session.turns)
            return None
        session.number += 1
        before = said(session.prompt, self._seed, rid, output_ids, self._vocab_size)
        text = fresh(self._seed, f"{session.name}.t{session.number}", turn.user_tokens)
        session.prompt = followed_by(before, [text], self._vocab_size)
        return self._send(session, now_ns + turn.think_ns, turn.output_tokens)

    def notes(self) -> list[str]:
        """See ``Contents``."""
        notes = cut_note(self._cut, self._terms)
        if self._full:
            notes.append(f"{self._full} turns were not sent: {self._terms.limit} were used up")
        if self._broken:
            notes.append(f"{self._broken} turns were not sent: a turn before them produced nothing")
        return notes

    def _plan(self) -> Iterator[_Turn]:
        for number in range(next(self._turns)):
            user_tokens, output_tokens = next(self._lengths)
            if number == 0:
                yield _Turn(user_tokens, output_tokens, 0)
            else:
                user_tokens = next(self._user) if self._user else user_tokens
                yield _Turn(user_tokens, output_tokens, round(next(self._thinks) * SECOND_NS))

    def _send(self, session: _Session, arrival_ns: int, output_tokens: int) -> TimedRequest:
        rid = f"{session.name}.t{session.number}"
        self._live[rid] = session
        return self._terms.request(arrival_ns, rid, session.prompt, output_tokens, session=session.name)


def turns_per_session(config: Sessions) -> int | None:
    """How many turns a session plans, where that is not drawn."""
    return max(int(config.turns.value + 0.5), 1) if isinstance(config.turns, Fixed) else None
