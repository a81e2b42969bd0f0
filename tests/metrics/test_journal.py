"""The journal's file: what is written is read; whatever else is given is refused in words, without big memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from testbed import simulate
from testbed.messages import (
    AbortRequest,
    BatchGenerateRequest,
    FlushCache,
    GenerateRequest,
    GetInternalState,
    GrammarReady,
    GrammarSpec,
    Message,
    Prompt,
    Segment,
    SetInternalState,
    SlowDown,
    Timer,
    TokenPrompt,
    decode_message,
    encode_message,
)
from testbed.metrics.journal import HEADER, LAST_NS, Journal
from testbed.sampling import SamplingParams
from tests.study.recorded import controls, everything, scenario

QUIET = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BIG_BYTES = 64 << 20
"""No small file may cost this much."""

# -- messages ----------------------------------------------------------------------------

numbers = st.integers(-(2**63), 2**64 - 1)
segments = st.builds(Segment, st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 2**31 - 1))
prompts = st.builds(Prompt, st.lists(segments, max_size=3)) | st.builds(
    lambda ids: TokenPrompt(np.array(ids, np.int32)), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5)
)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(allow_nan=False),
    top_k=st.integers(-1, 2**62),
    logit_bias=st.lists(st.tuples(st.integers(0, 9), st.floats(-9, 9)), max_size=2).map(tuple),
    seed=st.none() | numbers,
    stop_token_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
)
requests = st.builds(
    GenerateRequest,
    rid=st.text(max_size=5),
    prompt=prompts,
    max_new_tokens=st.none() | numbers,
    ignore_eos=st.booleans(),
    priority=st.none() | numbers,
    extra_key=st.text(max_size=3),
    sampling=samplings,
    return_logprob=st.booleans(),
    logprob_start=st.integers(-1, 5),
    grammar=st.none() | st.builds(GrammarSpec, st.just("regex"), st.text(max_size=3)),
)
messages = st.one_of(
    requests,
    st.builds(BatchGenerateRequest, st.lists(requests, max_size=3).map(tuple)),
    st.builds(AbortRequest, st.text(max_size=3), st.booleans()),
    st.builds(GrammarReady, st.integers(0, 2**62 - 1), st.text(max_size=3), st.integers(400, 503)),
    st.just(FlushCache()),
    st.just(GetInternalState()),
    st.builds(SetInternalState, st.dictionaries(st.text(max_size=3), numbers | st.floats(allow_nan=False), max_size=2)),
    st.builds(SlowDown, numbers),
    st.builds(Timer, st.text(max_size=3)),
)


def plain(value: Any) -> Any:
    """A message in types that can be compared."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tolist())
    if isinstance(value, msgspec.Struct):
        return (type(value).__name__, {name: plain(getattr(value, name)) for name in value.__struct_fields__})
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@QUIET
@given(messages)
def test_a_message_is_read_as_it_was_written(message: Message) -> None:
    data = encode_message(message)
    assert plain(decode_message(data)) == plain(message)
    assert encode_message(decode_message(data)) == data


@QUIET
@given(messages, st.data())
def test_a_damaged_message_is_a_value_error_or_another_message(message: Message, data: st.DataObject) -> None:
    whole = bytearray(encode_message(message))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    read_or_refuse(decode_message, bytes(whole))
    read_or_refuse(decode_message, bytes(whole[: data.draw(st.integers(0, len(whole)))]))


def read_or_refuse(read: Callable[[bytes], Any], data: bytes) -> Any:
    """What is read; None where it is refused as it should be. Never much memory."""
    tracemalloc.start()
    try:
        return read(data)
    except ValueError as error:
        assert str(error)
        return None
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < BIG_BYTES + 100 * len(data), f"{most:,} bytes for {len(data):,}"


HOSTILE_MESSAGES: list[Any] = [
    {"type": "Exec", "code": "import os"},
    {"type": "GenerateRequest"},
    {"type": "AbortRequest", "rid": 5},
    {"type": "AbortRequest", "rid": "r", "more": 1},
    {"type": "Timer", "name": "x" * 10, "type2": 0},
    {"rid": "r"},
    ["AbortRequest", "r"],
    None,
    {"type": "GenerateRequest", "rid": "r", "prompt": {"type": "Prompt", "segments": [[0, 0, -1]]}},
    {"type": "GenerateRequest", "rid": "r", "prompt": {"type": "Prompt", "segments": [[0, -1, 1]]}},
    {"type": "GenerateRequest", "rid": "r", "prompt": {"type": "Prompt", "segments": [[0, 0, 2**31]]}},
    {"type": "GenerateRequest", "rid": "r", "prompt": {"type": "Prompt", "segments": [[0, 0, 1.5]]}},
    {"type": "GenerateRequest", "rid": "r", "prompt": {"type": "TokenPrompt", "tokens": b"123"}},
    {"type": "GenerateRequest", "rid": "r", "prompt": {"type": "TokenPrompt", "tokens": [1, 2]}},
    {"type": "GenerateRequest", "rid": "r", "prompt": {"type": "TokenPrompt", "tokens": 2**40}},
    {"type": "GenerateRequest", "rid": "r", "prompt": {"type": "TokenPrompt", "tokens": {"a": 1}}},
    {"type": "BatchGenerateRequest", "requests": [{"type": "AbortRequest", "rid": "r"}]},
]


@pytest.mark.parametrize("content", HOSTILE_MESSAGES, ids=str)
def test_hostile_messages_are_refused(content: Any) -> None:
    assert read_or_refuse(decode_message, msgspec.msgpack.encode(content)) is None


@pytest.mark.parametrize("where", ["at the top", "as tokens"])
def test_nesting_without_end_is_refused(where: str) -> None:
    deep = b"\x91" * 100_000 + b"\xc0"
    head = msgspec.msgpack.encode({"type": "TokenPrompt", "tokens": 0})[:-1]
    prompt = msgspec.msgpack.encode({"type": "GenerateRequest", "rid": "r", "prompt": 0})[:-1] + head
    assert read_or_refuse(decode_message, deep if where == "at the top" else prompt + deep) is None


# -- journals -------------------------------------------------------------------------------


def written(paced: bool) -> bytes:
    journal = everything(paced, loop="overlap").records.journal
    assert journal is not None
    return journal.to_bytes()


@pytest.fixture(scope="module", params=[False, True], ids=["simulated", "paced"])
def whole(request: pytest.FixtureRequest) -> bytes:
    return written(request.param)


def test_what_is_written_is_read(whole: bytes) -> None:
    again = Journal.from_bytes(whole)
    assert again.to_bytes() == whole
    assert len(again.sent) > 50 and again.stopped and len(again.arrivals) > 20


def test_log_probabilities_and_rows_without_a_token_are_kept() -> None:
    from testbed.batch import StepLogprobs, StepResult

    journal = Journal(controls().records.journal.setting, keeps_tokens=True)  # type: ignore[union-attr]
    found = StepLogprobs(
        np.array([-0.5, np.nan], np.float32),
        np.array([[1, 2], [3, 4]], np.int32),
        np.array([[-0.5, -1], [-2, -3]], np.float32),
        np.empty(0, np.float32),
    )
    journal.received(5, [Timer("a"), Timer("b")])
    journal.stepped(StepResult(np.array([7, 0], np.int32), (0,), logprobs=found, invalid=(1,)), 9)
    journal.stepped(StepResult(np.array([8], np.int32)), 11)
    again = Journal.from_bytes(journal.to_bytes())
    assert list(again.deliveries()) == [(5, [Timer("a"), Timer("b")])]
    assert [tokens.tolist() for tokens in again.tokens] == [[7, 0], [8]] and list(again.sent) == [9, 11]
    assert (again.stopped, again.invalid) == ({0: (0,)}, {0: (1,)}) and list(again.logprobs) == [0]
    for part, expected in zip(again.logprobs[0], found, strict=True):
        assert part.dtype == expected.dtype and np.array_equal(part, expected, equal_nan=part.dtype != np.int32)


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.parametrize("engine", [{}, {"kv_tokens": 1500, "init_new_token_ratio": 0.05}, {"page_size": 16}], ids=str)
def test_leaps_leave_the_same_journal(engine: dict[str, Any], loop: str) -> None:
    slow = {"arrivals": {"kind": "poisson", "rate_per_s": 25}, "max_new_tokens": 120}
    chosen = scenario(engine, loop, workload=slow)
    leaping, walking = (simulate(chosen, leap=leap) for leap in (True, False))
    assert leaping.records.counters["steps_leapt"] > 100 and "leaps" not in walking.records.counters
    one, other = leaping.records.journal, walking.records.journal
    assert one is not None and other is not None and one.to_bytes() == other.to_bytes()


def test_a_journal_without_a_setting_is_not_written() -> None:
    with pytest.raises(ValueError, match="without a setting"):
        Journal().to_bytes()


@QUIET
@given(st.binary(max_size=300))
@example(b"")
@example(b"TBJL")
@example(HEADER)
@example(b"TBJL\x02\x00" + b"\x80")
@example(b"TBDL\x01\x00")
def test_noise_is_refused(noise: bytes) -> None:
    assert read_or_refuse(Journal.from_bytes, noise) is None
    assert read_or_refuse(Journal.from_bytes, HEADER + noise) is None


def test_another_version_is_named(whole: bytes) -> None:
    with pytest.raises(ValueError, match="journal version 2; this program reads version 1"):
        Journal.from_bytes(b"TBJL\x02\x00" + whole[6:])


@QUIET
@given(st.data())
def test_a_cut_journal_is_refused(whole: bytes, data: st.DataObject) -> None:
    assert read_or_refuse(Journal.from_bytes, whole[: data.draw(st.integers(0, len(whole) - 1))]) is None
    assert read_or_refuse(Journal.from_bytes, whole + data.draw(st.binary(min_size=1, max_size=9))) is None


def edited(whole: bytes, **fields: Any) -> bytes:
    """The same journal with other fields; None takes one away."""
    document = {**msgspec.msgpack.decode(whole[6:]), **fields}
    return HEADER + msgspec.msgpack.encode({name: value for name, value in document.items() if value is not None})


def int64(*values: int) -> bytes:
    return np.array(values, "<i8").tobytes()


SETTING = {"loop": "normal", "vocab_size": 100, "kv_tokens": 64, "context_length": 64, "seed": 0}
PART = [[1], b"1234"]
HOSTILE: list[dict[str, Any]] = [
    {"stamps": None},
    {"code": b"import os"},
    {"setting": {**SETTING, "more": 1}},
    {"setting": {**SETTING, "kv_tokens": -1}},
    {"setting": {**SETTING, "kv_tokens": 2**63}},
    {"setting": {**SETTING, "vocab_size": 0}},
    {"setting": {**SETTING, "seed": -1}},
    {"setting": {**SETTING, "loop": 7}},
    {"keeps_tokens": 1},
    {"keeps_tokens": True, "tokens": b"", "counts": b""},
    {"keeps_tokens": False, "tokens": b"1234", "counts": int64(1)},
    {"stamps": b"1234567"},
    {"stamps": int64(5, 4)},
    {"stamps": int64(-1, 4), "arrivals": []},
    {"stamps": int64(LAST_NS), "arrivals": []},
    {"stamps": b""},
    {"stamps": [1, 2, 3]},
    {"sent": int64(9, 3)},
    {"sent": int64(-(2**63))},
    {"arrivals": [[2**62, encode_message(FlushCache())]]},
    {"arrivals": [[1, encode_message(FlushCache())], [0, encode_message(FlushCache())]]},
    {"arrivals": [[-1, encode_message(FlushCache())]]},
    {"arrivals": [[0, b""]]},
    {"arrivals": [[0, encode_message(FlushCache()) + b"\xc0"]]},
    {"counts": int64(2**62, 2**62, 2**62, 2**62), "tokens": b""},
    {"counts": int64(-1, 1), "tokens": b""},
    {"tokens": b"123"},
    {"stopped": [[10**9, [0]]]},
    {"stopped": [[0, [-1]]]},
    {"stopped": [[3, [0]], [2, [0]]]},
    {"invalid": [[0, [2**40]]]},
    {"logprobs": [[0, [PART, PART, PART]]]},
    {"logprobs": [[0, [[[2**31 - 1, 2**31 - 1], b""]] * 4]]},
    {"logprobs": [[0, [[[3], b"1234"]] * 4]]},
    {"logprobs": [[0, [[[1] * 200, b"1234"]] * 4]]},
    {"logprobs": [[10**9, [PART] * 4]]},
]


@pytest.mark.parametrize("fields", HOSTILE, ids=lambda fields: str(fields)[:60])
def test_hostile_journals_are_refused(whole: bytes, fields: dict[str, Any]) -> None:
    assert read_or_refuse(Journal.from_bytes, edited(whole, **fields)) is None


def test_an_edit_of_nothing_is_no_reason_to_refuse(whole: bytes) -> None:
    assert Journal.from_bytes(edited(whole)).to_bytes() == whole


anything = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=4) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(QUIET, max_examples=400)
@given(st.data())
def test_any_part_of_any_type_is_refused_or_read(whole: bytes, data: st.DataObject) -> None:
    """Some place in the document becomes something else; what is read can be written again."""
    document = msgspec.msgpack.decode(whole[6:])
    node: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = data.draw(anything)
        break
    found = read_or_refuse(Journal.from_bytes, HEADER + msgspec.msgpack.encode(document))
    if found is not None:
        assert plain(list(Journal.from_bytes(found.to_bytes()).deliveries())) == plain(list(found.deliveries()))
