"""Streamed text is the text of the whole, whatever the tokenizer, the ids, the pushes and the stop strings."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from testbed.engine.tokenizer import SPECIAL_TOKENS
from testbed.messages import TextOptions
from testbed.scenario.errors import InputError
from testbed.server.detokenize import (
    CHARACTER_BYTES,
    PROMPT_TAIL_TOKENS,
    TextStream,
    Vocabulary,
    decode_all,
    shown_ids,
)
from tests.server.cases import Reference, searched
from tests.server.kinds import ADDED, KINDS, SCRIPTS, SPECIAL

FFFD = "\ufffd"
BYTE_LEVEL, FALLBACK = ("our own", "byte-level"), ("llama", "gemma")
WITH_BYTES = (*BYTE_LEVEL, *FALLBACK)
TEXTS = list(SCRIPTS.values())
CLASSES = bytes.fromhex("41 80 8F 90 9F A0 BF C1 C2 DF E0 E1 EC ED EE EF F0 F1 F3 F4 F5 FF")
"""The ends of every class of bytes that UTF-8 tells apart."""
FOLLOWING = [
    b"",
    b"A",
    b"\xff",
    *(bytes([first]) + b"\xbf" * more for first in (0x80, 0x90, 0xBF) for more in range(3)),
]
"""Bytes of which some complete whatever character is open, and others break it."""


@cache
def reference(kind: str) -> Reference:
    return Reference(KINDS[kind]())


def byte_ids(kind: str, data: bytes) -> list[int]:
    """A token for each byte."""
    names = {byte: character for character, byte in CHARACTER_BYTES.items()}
    if kind in FALLBACK:
        names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    return [reference(kind).tokenizer.token_to_id(names[byte]) for byte in data]


def stream_of(kind: str, prompt_tail: list[int] | None = None, **options: object) -> TextStream:
    return TextStream(reference(kind).vocabulary, prompt_tail or [], TextOptions(**options))  # type: ignore[arg-type]


def in_one(kind: str, token_ids: list[int], prompt_tail: list[int] | None = None) -> str:
    return decode_all(reference(kind).vocabulary, prompt_tail or [], token_ids, TextOptions())[0]


def agreed(texts: list[str]) -> str:
    """Their common beginning: that of the two which differ most."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(texts), max(texts), strict=False))
    return "".join(one for one, _ in pairs)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(random=st.randoms(use_true_random=False))
def test_streamed_is_whole_is_transformers(kind: str, random: Random) -> None:
    ours = reference(kind)
    case = ours.draw(random)
    expected = ours.expected(case)
    assert ours.streamed(case) == expected
    assert decode_all(ours.vocabulary, [], case.token_ids, case.options) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_token_by_token(kind: str) -> None:
    ours = reference(kind)
    for text in TEXTS:
        token_ids = ours.tokenizer.encode(text, add_special_tokens=False).ids
        stream = stream_of(kind)
        chunks = [stream.push([token]) for token in token_ids] + [stream.finish()]
        assert "".join(chunks) == ours.decode(token_ids)
        assert kind != "our own" or "".join(chunks) == text  # others bend it: an unknown word, an added "naïve"


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_four_bytes_of_any_classes(kind: str) -> None:
    """As Rust's ``from_utf8_lossy`` has them in the library, and as Python's decoder has them."""
    ours = reference(kind)
    classes = byte_ids(kind, CLASSES)
    for length in range(1, 5 if kind == "our own" else 4):
        for token_ids, data in zip(
            itertools.product(classes, repeat=length), itertools.product(CLASSES, repeat=length), strict=True
        ):
            stream = ours.vocabulary.text_after([], True)
            text = "".join([stream.push([token]) for token in token_ids]) + stream.finish()
            assert text == bytes(data).decode(errors="replace") == ours.tokenizer.decode(list(token_ids))


@pytest.mark.parametrize("kind", FALLBACK)
def test_three_byte_tokens_of_any_classes(kind: str) -> None:
    ours = reference(kind)
    letter = ours.tokenizer.token_to_id("e")
    for token_ids in itertools.product([letter, *byte_ids(kind, CLASSES)], repeat=3):
        stream = ours.vocabulary.text_after([], True)
        text = "".join([stream.push([token]) for token in token_ids]) + stream.finish()
        assert text == ours.tokenizer.decode(list(token_ids))


@pytest.mark.parametrize("kind", WITH_BYTES)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.lists(st.sampled_from([*CLASSES, *"né你🫠".encode()]), max_size=8), letter=st.integers(0, 8))
def test_what_every_continuation_agrees_on_is_sent(kind: str, data: list[int], letter: int) -> None:
    """Nothing is sent too early, and nothing is held back longer than it must be.

    But that Python's decoder wants to see a third byte after half a surrogate, ``ED A0``, though it is wrong already.
    """
    ours = reference(kind)
    token_ids = byte_ids(kind, bytes(data))
    token_ids.insert(letter, ours.tokenizer.token_to_id("e"))
    following = [byte_ids(kind, more) for more in FOLLOWING]
    half_a_surrogate = [byte_ids(kind, bytes([0xED, second])) for second in range(0xA0, 0xC0)]
    stream, sent = stream_of(kind), ""
    for length in range(1, len(token_ids) + 1):
        sent += stream.push(token_ids[length - 1 : length])
        certain = agreed([ours.decode(token_ids[:length] + more) for more in following])
        if token_ids[:length][-2:] in half_a_surrogate:
            assert certain.startswith(sent) and not certain[len(sent) :].strip(FFFD)
        else:
            assert sent == certain


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "wordpiece, clean", "words"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(random=st.randoms(use_true_random=False))
def test_whole_tokens_are_sent_at_once(kind: str, random: Random) -> None:
    ours = reference(kind)
    token_ids = ours.draw(random).token_ids
    stream, sent = stream_of(kind), ""
    for length in range(1, len(token_ids) + 1):
        sent += stream.push(token_ids[length - 1 : length])
        assert sent == ours.decode(token_ids[:length])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.text("ab", max_size=4), max_size=6),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_what_no_stop_string_can_take_back_is_sent(parts: list[str], stop: list[str], include: bool) -> None:
    """Against every way in which a text of two letters, or others, can go on: it is never sent later than certain."""
    options = TextOptions(stop=tuple(stop), include_stop=include)
    futures = ["".join(more) for length in range(4) for more in itertools.product("abz", repeat=length)]
    stream, sent = stream_of("our own", stop=tuple(stop), include_stop=include), ""
    for count in range(1, len(parts) + 1):
        sent += stream.push(reference("our own").tokenizer.encode(parts[count - 1]).ids)
        outcomes = [searched("".join(parts[:count]) + more, options) for more in futures]
        ended = {found for _, found in outcomes}
        assert stream.stopped == (outcomes[0][1] if len(ended) == 1 else None)
        certain = agreed([text for text, _ in outcomes])
        assert sent == certain if not include or stream.stopped else certain.startswith(sent)
    sent += stream.finish()
    assert (sent, stream.stopped) == searched("".join(parts), options)


def test_every_cut_of_a_text_around_a_stop_string() -> None:
    text, options = "one 🫠\nUser: two", TextOptions(stop=("\nUser:", "\nUser: t"))
    data = byte_ids("our own", text.encode())[2:16]
    for cuts in itertools.product((False, True), repeat=13):
        ends = [place + 1 for place, here in enumerate(cuts) if here]
        stream = TextStream(reference("our own").vocabulary, [], options)
        chunks = [stream.push(data[a:b]) for a, b in zip([0, *ends], [*ends, 14], strict=True)]
        assert "".join([*chunks, stream.finish()]) == "e 🫠" and stream.stopped == "\nUser:"


@pytest.mark.parametrize(
    ("stop", "include", "text", "found"),
    [
        (("END",), False, "ab", "END"),
        (("END",), True, "abEND", "END"),
        (("NDc", "bE"), False, "a", "bE"),  # they overlap: the one that begins first
        (("E", "END"), True, "abE", "E"),  # they begin together: the one named first
        (("END", "E"), True, "abEND", "END"),
        (("bENDx", "N"), False, "abE", "N"),  # the first did not come to its end
        (("ENDcde",), False, "abENDcd", None),  # held back until there is no more
        (("", "cd"), False, "abEND", "cd"),  # an empty one stops nothing
        ((), False, "abENDcd", None),
    ],
)
def test_stop_rules(stop: tuple[str, ...], include: bool, text: str, found: str | None) -> None:
    token_ids = byte_ids("our own", b"abENDcd")
    for size in range(1, 8):
        stream = stream_of("our own", stop=stop, include_stop=include)
        chunks = [stream.push(token_ids[begin : begin + size]) for begin in range(0, 7, size)]
        assert ("".join([*chunks, stream.finish()]), stream.stopped) == (text, found)


def test_nothing_follows_a_stop_string() -> None:
    stream = stream_of("our own", stop=("b",))
    assert stream.push(byte_ids("our own", b"abc")) == "a" and stream.stopped == "b"
    assert stream.push(byte_ids("our own", b"d")) == "" == stream.finish() and stream.stopped == "b"


def test_a_stop_string_inside_a_token() -> None:
    word = reference("our own").tokenizer.encode(" scheduler").ids
    assert len(word) == 1
    for stop, include, text in (("edul", False, " sch"), ("edul", True, " schedul"), (" scheduler", False, "")):
        stream = stream_of("our own", stop=(stop,), include_stop=include)
        assert stream.push(word) == text and stream.stopped == stop


@pytest.mark.parametrize("kind", WITH_BYTES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_prompts_cut_at_every_byte(kind: str, script: str) -> None:
    """The character that the cut goes through belongs to the output, all of it; what was before is not repeated."""
    data = SCRIPTS[script].encode()[:60]
    data = data.decode(errors="ignore").encode()
    token_ids = byte_ids(kind, data)
    for place in range(1, len(data) + 1):
        before = data[:place].decode(errors="ignore")
        output = in_one(kind, token_ids[place:], token_ids[:place][-PROMPT_TAIL_TOKENS:])
        assert before + output == data.decode()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_go_on_where_prompts_end(kind: str) -> None:
    ours = reference(kind)
    token_ids = ours.tokenizer.encode("the quick brown fox, does it not? the lazy dog", add_special_tokens=False).ids
    for place in range(1, len(token_ids)):
        before = ours.decode(token_ids[:place])
        output = in_one(kind, token_ids[place:], token_ids[:place][-PROMPT_TAIL_TOKENS:])
        assert before + output == ours.decode(token_ids)


@pytest.mark.parametrize("kind", WITH_BYTES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(prompt=st.binary(max_size=12), output=st.binary(max_size=8), text=st.sampled_from(["", "你", "🫠n"]))
def test_the_tail_of_a_prompt_is_enough(kind: str, prompt: bytes, output: bytes, text: str) -> None:
    before, after = byte_ids(kind, text.encode() + prompt), byte_ids(kind, output)
    assert in_one(kind, after, before[-PROMPT_TAIL_TOKENS:]) == in_one(kind, after, before)
    if kind in BYTE_LEVEL:
        read = reference(kind).decode(before + after)
        assert read.endswith(in_one(kind, after, before))
        assert len(read) - len(in_one(kind, after, before)) == len(in_one(kind, before)) - len(in_one(kind, [], before))


@pytest.mark.parametrize("kind", WITH_BYTES)
@pytest.mark.parametrize("pattern", ["FF", "E4", "F0 9F", "80", "E4 BD 41", "F0 9F AB F0"])
def test_long_runs_of_broken_bytes(kind: str, pattern: str) -> None:
    """They appear as they come, and are read once: 20,000 tokens read again with each new one would not end."""
    token_ids = byte_ids(kind, bytes.fromhex(pattern) * 20_000)[:20_000]
    stream = stream_of(kind, stop=("\ufffdx",))
    chunks = [stream.push([token]) for token in token_ids]
    assert len("".join(chunks)) > 6000
    assert "".join(chunks) + stream.finish() == reference(kind).decode(token_ids)


@pytest.mark.parametrize("kind", FALLBACK)
def test_a_long_valid_run_is_kept_until_it_ends(kind: str) -> None:
    """Since one wrong byte at its end would make all of it U+FFFD in the library."""
    token_ids = byte_ids(kind, "🫠".encode() * 5000)
    for last, text in ((b"", "🫠" * 5000), (b"\xff", FFFD * 20_001)):
        stream = stream_of(kind)
        assert not any(stream.push([token]) for token in token_ids)
        assert stream.push(byte_ids(kind, last)) + stream.finish() == text
        assert reference(kind).decode(token_ids + byte_ids(kind, last)) == text


def test_special_and_added_tokens() -> None:
    for kind in KINDS:
        ours = reference(kind)
        names = (*SPECIAL_TOKENS[:2], "the") if kind == "our own" else (*SPECIAL, *ADDED)
        token_ids = [token for name in names if (token := ours.tokenizer.token_to_id(name)) is not None]
        token_ids = [*token_ids, ours.tokenizer.get_vocab_size() + 7, *(one for one in token_ids for _ in range(2))]
        for skip in (True, False):
            options = TextOptions(skip_special_tokens=skip, spaces_between_special_tokens=skip)
            text, _ = decode_all(ours.vocabulary, [], token_ids, options)
            assert text == ours.decode(token_ids, skip)
            assert (names[0] in text) is not skip


def test_a_token_that_ends_a_request_has_no_text() -> None:
    assert shown_ids([5, 6, 7], True, TextOptions()) == [5, 6]
    assert shown_ids([5, 6, 7], True, TextOptions(include_stop=True)) == [5, 6, 7]
    assert shown_ids([5, 6, 7], False, TextOptions()) == [5, 6, 7]
    assert shown_ids([], False, TextOptions()) == []


def test_streams_do_not_meet() -> None:
    texts = [text.encode() for text in TEXTS]
    streams = [stream_of("our own") for _ in texts]
    sent = [""] * len(texts)
    for place in range(max(map(len, texts))):
        for index, (stream, data) in enumerate(zip(streams, texts, strict=True)):
            sent[index] += stream.push(byte_ids("our own", data[place : place + 1]))
    assert [text + stream.finish() for text, stream in zip(sent, streams, strict=True)] == TEXTS


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ],
)
def test_a_decoder_that_looks_further_is_refused(decoder: decoders.Decoder) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoder
    with pytest.raises(InputError, match="decoder is"):
        Vocabulary(tokenizer)


def test_simulation_does_not_need_a_tokenizer() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('tokenizers', 'transformers', 'torch')))"
    seen = "assert not any(name.startswith('testbed.server') for name in sys.modules)"
    command = f"{blocked}; import testbed; {seen}; import testbed.server.detokenize"
    subprocess.run([sys.executable, "-c", command], check=True)
