"""The detokenizer's answers for many interleaved requests are those of each request alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.messages import TextOptions
from testbed.server import wire
from testbed.server.detokenize import TextStream, Vocabulary, shown_ids
from testbed.server.detokenizer import Detokenizer
from testbed.server.wire import Begin, Delta, Ended, RowLogprobs, StepTokens
from tests.server.serving import TOKENIZER

VOCABULARY = Vocabulary(TOKENIZER)
SIZE = TOKENIZER.get_vocab_size()


@dataclass
class Case:
    """A request: its outputs, how it ends, and what its client wants."""

    rid: str
    ids: list[int]
    reason: str
    stream: bool
    options: TextOptions
    late: int
    """Tokens that still come behind a stop string, before the scheduler hears of it."""
    sent: int = 0
    heard: list[Delta] = field(default_factory=list)
    found: bool = False

    @property
    def by_step(self) -> bool:
        """Whether its tokens come step by step."""
        return self.stream or bool(self.options.stop)

    def expected(self) -> tuple[str, str | None, int]:
        """(text, stop string, tokens that count) of this request alone: those that it took to find the string."""
        shown = shown_ids(self.ids, self.reason == "stop", self.options)
        stream = TextStream(VOCABULARY, (), self.options)
        text = ""
        for count, token in enumerate(shown, 1):
            text += stream.push((token,))
            if stream.stopped is not None:
                return text, stream.stopped, count
        return text + stream.finish(), stream.stopped, len(self.ids)


@st.composite
def cases(draw: st.DrawFn) -> list[Case]:
    made = []
    for number in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(0, SIZE - 1), max_size=12))
        text = TOKENIZER.decode(ids)
        at = draw(st.integers(0, max(len(text) - 1, 0)))
        stop = (text[at : at + draw(st.integers(1, 5))],) if text and draw(st.booleans()) else ()
        options = TextOptions(stop=stop, include_stop=draw(st.booleans()), skip_special_tokens=draw(st.booleans()))
        reason = draw(st.sampled_from(("length", "stop"))) if ids else "abort"
        rid = f"{draw(st.integers(0, 2))}:{number}"
        made.append(Case(rid, ids, reason, draw(st.booleans()), options, draw(st.integers(0, 3))))
    return made


def end_of(case: Case, output_ids: list[int], reason: str) -> Ended:
    rows = [RowLogprobs(-1.0 - token, [], []) for token in output_ids]
    text = case.options
    return Ended(case.rid, reason, "", 200, 5, 2, wire.pack_ids(output_ids), text, b"", None, rows)


def steps(draw: st.DataObject, cases: list[Case], detokenizer: Detokenizer) -> None:
    """The scheduler: steps of some of the requests, and ends in any order."""
    running = list(cases)
    while running:
        rows = [case for case in running if case.by_step and case.sent < len(case.ids) - 1 and draw.draw(st.booleans())]
        if rows:
            step = StepTokens(
                [Begin(case.rid, b"", case.options, case.stream) for case in rows if not case.sent],
                [case.rid for case in rows],
                wire.pack_ids([case.ids[case.sent] for case in rows]),
                {place: RowLogprobs(-1.0 - case.ids[case.sent], [], []) for place, case in enumerate(rows)},
            )
            deltas, found = detokenizer.tokens(step)
            for case in rows:
                case.sent += 1
                case.heard += [delta for delta in deltas if delta.rid == case.rid]
                case.found |= case.rid in found
        for case in list(running):
            if case.found and (case.late == 0 or case.sent >= len(case.ids) - 1):
                case.heard.append(detokenizer.ended(end_of(case, case.ids[: case.sent], "abort")))
                running.remove(case)
            elif case.found:
                case.late -= 1
            elif not case.by_step or case.sent >= len(case.ids) - 1:
                case.heard.append(detokenizer.ended(end_of(case, case.ids, case.reason)))
                running.remove(case)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_every_request_is_told_what_it_alone_would_be(cases: list[Case], data: st.DataObject) -> None:
    detokenizer = Detokenizer(VOCABULARY)
    steps(data, cases, detokenizer)
    for case in cases:
        text, stopped, count = case.expected()
        assert "".join(delta.text for delta in case.heard) == text
        ids = [token for delta in case.heard for token in delta.token_ids]
        assert ids == case.ids[:count]
        assert [row.token for delta in case.heard for row in delta.logprobs or ()] == [-1.0 - token for token in ids]
        *before, last = case.heard
        assert all(delta.finished is None for delta in before) and (case.stream or not before)
        finished = last.finished
        assert finished is not None and finished.output_tokens == count
        assert finished.status == 200 and (finished.prompt_tokens, finished.cached_tokens) == (5, 2)
        if stopped is not None:
            assert (finished.reason, finished.matched) == ("stop", stopped)
        else:
            token = case.ids[-1] if case.reason == "stop" else None
            assert (finished.reason, finished.matched) == (case.reason, token)
    assert not detokenizer._streams


def test_the_end_of_a_request_that_is_not_known_is_passed_on() -> None:
    """Refused before it began: there is nothing but the reason."""
    end = Ended("0:x", "error", "the prompt is empty", 400, 0, 0, b"", None)
    finished = Detokenizer(VOCABULARY).ended(end).finished
    assert finished is not None and (finished.status, finished.message) == (400, "the prompt is empty")
