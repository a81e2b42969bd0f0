"""What compiles the server's grammars: right masks, and no grammar that hangs it, starves it, or stays behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Collection, Iterator
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from testbed.messages import GrammarReady, GrammarSpec
from testbed.scenario.errors import InputError
from testbed.server.grammar import ServerGrammars, Trial, eos_token_ids
from testbed.server.options import OWN_TOKENIZER
from testbed.server.trial import MIB, TrialOptions
from tests.server.serving import PATIENCE_S, TOKENIZER, wait_gone

VOCABULARY = 4100
"""Of the model: a few more than the tokenizer's, and no multiple of 32."""
EOS = 1
CORES = os.sched_getaffinity(0)
OPTIONS = TrialOptions(str(OWN_TOKENIZER), VOCABULARY, (EOS,), cpu_ms=600, memory_mib=256)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def regex(text: str) -> GrammarSpec:
    return GrammarSpec("regex", text)


def schema(value: Any) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(value))


def for_ever(number: int) -> GrammarSpec:
    """Seconds, and hundreds of megabytes."""
    return schema({"type": "integer", "multipleOf": 999_983, "title": str(number)})


class Desk:
    """Grammars, and what they tell the loop."""

    def __init__(
        self,
        options: TrialOptions = OPTIONS,
        memory_mib: int = 64,
        vocab_size: int = VOCABULARY,
        cores: Collection[int] = CORES,
    ) -> None:
        self.told: Queue[GrammarReady] = Queue()
        self.grammars = ServerGrammars(options, vocab_size, memory_mib, self.told.put, cores)
        self.asked = 0

    def ask(self, spec: GrammarSpec) -> int:
        self.asked += 1
        self.grammars.compile(self.asked, spec)
        return self.asked

    def answers(self, count: int) -> dict[int, GrammarReady]:
        found = [self.told.get(timeout=PATIENCE_S) for _ in range(count)]
        return {ready.rank: ready for ready in found}

    def answer(self, spec: GrammarSpec) -> GrammarReady:
        rank = self.ask(spec)
        return self.answers(1)[rank]

    def open(self, spec: GrammarSpec) -> int:
        """A request whose grammar is ready."""
        rank = self.ask(spec)
        assert self.answers(1)[rank].error == ""
        return rank

    def error(self, spec: GrammarSpec) -> GrammarReady:
        ready = self.answer(spec)
        assert ready.error
        return ready

    def processes(self) -> list[int]:
        """The compilers at work."""
        return [trial._process.pid for trial in self.grammars._trials if trial._process is not None]

    def masks(self, *ranks: int | None) -> NDArray[np.int32] | None:
        """Of a decode step of these requests; None: one without a grammar."""
        requests = [SimpleNamespace(rank=rank, grammar=rank, finish_reason=None) for rank in ranks]
        batch: Any = SimpleNamespace(prefills=[], decodes=requests, rows=len(requests))
        return self.grammars.masks(batch)

    def allowed(self, rank: int) -> list[int]:
        masks = self.masks(rank)
        assert masks is not None
        return tokens_of(masks[0])

    def write(self, rank: int, seed: int, most: int = 400) -> tuple[str, bool]:
        """A random text that the grammar allows, and whether it ends."""
        draw = np.random.Generator(np.random.Philox(key=seed)).integers
        tokens: list[int] = []
        while len(tokens) < most and (allowed := self.allowed(rank)):
            token = EOS if EOS in allowed else allowed[draw(0, len(allowed))]
            if token == EOS:
                return TOKENIZER.decode(tokens, skip_special_tokens=False), True
            self.grammars.accept(rank, token)
            tokens.append(token)
        return TOKENIZER.decode(tokens, skip_special_tokens=False), False


def tokens_of(mask: NDArray[np.int32]) -> list[int]:
    found: list[int] = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    return found


@pytest.fixture
def desk() -> Iterator[Desk]:
    one = Desk()
    with one.grammars:
        yield one


def person(text: str) -> bool:
    found = json.loads(text)
    return list(found) == ["name", "age"] and len(found["name"]) <= 8 and 0 <= found["age"] <= 130


TREE = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 1}}, "$ref": "#/$defs/t"}
MATCHING: list[tuple[GrammarSpec, Any]] = [
    (schema(PERSON), person),
    (GrammarSpec("json_object"), lambda text: isinstance(json.loads(text), dict)),
    (schema({"type": "array", "items": {"enum": ["é", "日本", "\n"]}, "maxItems": 5}), json.loads),
    (schema(TREE), json.loads),
    (regex("(red|green), [0-9]{2,5}!"), re.compile("(red|green), [0-9]{2,5}!").fullmatch),
    (regex("[а-я]{3} ?[😀-😎]"), re.compile("[а-я]{3} ?[😀-😎]").fullmatch),
    (GrammarSpec("ebnf", 'root ::= "<" [a-f]+ ">" | "none"'), re.compile("<[a-f]+>|none").fullmatch),
    (GrammarSpec("ebnf", 'start: item ("," item)*\nitem: /[a-z]/ | "(" start ")"'), re.compile("[a-z,()]+").fullmatch),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "matches"), MATCHING, ids=lambda given: getattr(given, "kind", ""))
def test_what_is_written_matches(desk: Desk, spec: GrammarSpec, matches: Any) -> None:
    """A recursive schema is one of them."""
    ended = 0
    for seed in range(12):
        rank = desk.open(spec)
        text, whole = desk.write(rank, seed)
        ended += whole
        assert not whole or matches(text), text
        desk.grammars.forget(rank)
    assert ended > 3 and desk.grammars.open == 0


def test_masks_of_a_batch(desk: Desk) -> None:
    """Rows without a grammar allow all, a failed one nothing; many rows are as few; nobody's mask is another's."""
    ranks = [desk.open(regex(f"[{letter}]+x")) for letter in "abcdefghijklmnop"]
    many, few = desk.masks(None, *ranks), [desk.masks(rank) for rank in ranks]
    assert many is not None and many.shape == (17, -(-VOCABULARY // 32)) and many.dtype == np.int32
    assert (many[0] == -1).all()
    assert np.array_equal(many[1:], np.concatenate([mask for mask in few if mask is not None]))
    for mask, letter in zip(many[1:], "abcdefghijklmnop", strict=True):
        texts = [TOKENIZER.decode([token]) for token in tokens_of(mask)]
        assert texts and all(re.fullmatch(f"{letter}+x?", text) for text in texts)
    desk.grammars.accept(ranks[3], TOKENIZER.encode("z").ids[0])
    after = desk.masks(None, *ranks)
    assert after is not None and not after[4].any() and np.array_equal(np.delete(after, 4, 0), np.delete(many, 4, 0))
    assert desk.masks(None, None) is None


def test_one_that_fails_on_the_way_allows_nothing(desk: Desk) -> None:
    """A step of its lexer needs more than it may (menu H19)."""
    hard = "start: T\nT: /(.*a.{10}.*)/ & /(.*b.{15}.*)/ & /(.*c.{20}.*)/"
    rank, other = desk.open(GrammarSpec("ebnf", hard)), desk.open(regex("a+"))
    before = desk.allowed(other)
    text, ended = desk.write(rank, seed=0, most=20)
    assert not ended and len(text) < 200
    assert not desk.allowed(rank) and desk.allowed(other) == before


@pytest.mark.parametrize(
    "spec",
    [
        regex(r"<\|eos\|>"),
        regex(r"a<\|user\|>"),
        GrammarSpec("ebnf", 'start: "a" <|user|>'),
        GrammarSpec("ebnf", "start: <[1]>"),
        schema({"enum": ["<|eos|>"]}),
    ],
)
def test_special_tokens_are_not_text(desk: Desk, spec: GrammarSpec) -> None:
    """The library would take the token for its name; here such a text ends where it is wanted (menu H16, H21)."""
    rank = desk.open(spec)
    text, ended = desk.write(rank, seed=0)
    assert not ended and "|" not in text and not desk.allowed(rank)


def broken(number: int) -> GrammarSpec:
    """Grammars that nobody can compile."""
    base = [
        lambda n: regex("(" * (n + 1)),
        lambda n: regex(f"a{{{n + 5},{n}}}"),
        lambda n: regex(rf"(a{n})\1"),
        lambda n: regex(rf"(?={n})a"),
        lambda n: regex(f"[z-a]{n}"),
        lambda n: GrammarSpec("ebnf", "(" * (10 * n + 3000)),
        lambda n: GrammarSpec("ebnf", f"root ::= rule{n}"),
        lambda n: GrammarSpec("ebnf", f'start: "a{n}'),
        lambda n: GrammarSpec("ebnf", f"root ::= root\n# {n}"),
        lambda n: GrammarSpec("json_schema", "{" * (n + 1)),
        lambda n: GrammarSpec("json_schema", f"{n}"),
        lambda n: GrammarSpec("json_schema", "[" * 100_000 + str(n)),
        lambda n: schema({"type": f"type{n}"}),
        lambda n: schema({"$ref": "#", "title": str(n)}),
        lambda n: schema({"$ref": f"http://127.0.0.1:{n + 1}/"}),
        lambda n: schema({"$ref": f"#/$defs/{n}"}),
        lambda n: schema({"enum": [], "title": str(n)}),
        lambda n: schema({"type": "integer", "minimum": n + 1, "maximum": n}),
        lambda n: schema({"not": {"const": n}}),
        lambda n: schema({"type": "string", "pattern": "(" * (n + 1)}),
    ]
    return base[number % len(base)](number // len(base))


def test_five_hundred_broken_ones(desk: Desk) -> None:
    """Each is refused in words, and those that are not broken are served among them (menu H12, H13)."""
    asked = {desk.ask(regex(f"ok{i}") if i % 50 == 7 else broken(i)): i for i in range(500)}
    for rank, ready in desk.answers(500).items():
        good = asked[rank] % 50 == 7
        assert (not ready.error) if good else (ready.status == 400 and len(ready.error) <= 500), broken(asked[rank])
    assert desk.grammars.open == 10


def test_a_compile_that_never_ends_is_ended() -> None:
    """Six times as many as there are compilers; a good one behind them is served (menu H14, H15)."""
    desk = Desk(TrialOptions(str(OWN_TOKENIZER), VOCABULARY, (EOS,), cpu_ms=100, memory_mib=256))
    with desk.grammars:
        hopeless = [desk.ask(for_ever(number)) for number in range(12)]
        good = desk.ask(regex("a"))
        answers = desk.answers(13)
        assert not answers[good].error
        assert all("more than 100 ms" in answers[rank].error and answers[rank].status == 400 for rank in hopeless)
        again = desk.error(for_ever(3))
        assert "more than 100 ms" in again.error


def test_nested_alternatives_of_every_depth(desk: Desk) -> None:
    """Sizes that double with each level (menu H14): compiled or refused, within the limits."""

    def nested(depth: int) -> GrammarSpec:
        inner: Any = {"type": "string"}
        for level in range(depth):
            fields = {"type": "object", "properties": {f"p{level}": inner}}
            inner = {"anyOf": [{"type": "array", "items": inner}, fields]}
        return schema(inner)

    ranks = [desk.ask(nested(depth)) for depth in range(1, 11)]
    answers = desk.answers(len(ranks))
    assert not answers[ranks[0]].error
    assert all(ready.status == 400 for ready in answers.values())


def test_a_grammar_that_wants_memory_is_ended() -> None:
    desk = Desk(TrialOptions(str(OWN_TOKENIZER), VOCABULARY, (EOS,), cpu_ms=30_000, memory_mib=32))
    with desk.grammars:
        assert "more than 32 MiB" in desk.error(for_ever(0)).error
        desk.open(regex("a"))


def test_equal_ones_are_compiled_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GrammarSpec] = []
    original = Trial.ask
    monkeypatch.setattr(Trial, "ask", lambda self, spec: (asked.append(spec), original(self, spec))[1])
    for _ in range(20):
        desk.ask(schema(PERSON))
        desk.ask(regex("("))
    answers = desk.answers(40)
    assert sum(not ready.error for ready in answers.values()) == 20 and desk.grammars.open == 20
    desk.open(schema(PERSON))
    assert "(" in desk.error(regex("(")).error and sorted(spec.kind for spec in asked) == ["json_schema", "regex"]


def test_what_is_kept_is_bounded() -> None:
    """In bytes: the longest unused goes first, what is in use stays, and more than fits is refused for now."""
    desk = Desk(memory_mib=4)
    with desk.grammars:
        held = [desk.open(regex(f"a{i}")) for i in range(2)]
        for i in range(60):
            desk.grammars.forget(desk.open(regex(f"b{i}")))
            assert desk.grammars.kept_bytes <= 4 * MIB
            assert all(desk.allowed(rank) for rank in held)
        kept = desk.grammars._kept
        assert regex("a0") in kept and regex("b59") in kept and regex("b0") not in kept
        refused = next(ready for i in range(100) if (ready := desk.answer(regex(f"c{i}"))).error)
        assert refused.status == 503 and "too many" in refused.error
        for rank in held:
            desk.grammars.forget(rank)
        desk.open(regex("a0"))
        for i in range(100):
            desk.error(regex(f"({i}"))
            assert desk.grammars.kept_bytes <= 4 * MIB


def test_a_request_that_ends_meanwhile_is_forgotten(desk: Desk) -> None:
    """Compiled for nobody it is not; for another one it is."""
    gone = [desk.ask(for_ever(number)) for number in range(4)]
    stays = desk.ask(for_ever(3))
    for rank in gone:
        desk.grammars.forget(rank)
    desk.grammars.forget(99)
    assert list(desk.answers(1)) == [stays]
    desk.open(regex("a"))
    assert desk.grammars.open == 1 and desk.told.empty()


def test_a_compiler_that_dies_is_started_again(desk: Desk) -> None:
    desk.open(regex("a"))
    first = desk.processes()
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    wait_gone(first)
    found = [desk.answer(regex(f"b{i}")) for i in range(6)]
    refused = [ready for ready in found if ready.error]
    assert len(refused) == len(first) and {ready.status for ready in refused} == {503}
    assert not found[-1].error
    desk.open(regex("b0"))  # it was not remembered against it


def test_nothing_stays_behind() -> None:
    desk = Desk()
    desk.open(regex("a"))
    desk.ask(for_ever(0))
    processes = desk.processes()
    assert processes
    desk.grammars.close()
    desk.grammars.close()
    wait_gone(processes)
    assert not any(thread.is_alive() for thread in desk.grammars._threads)


def test_a_tokenizer_with_more_tokens_than_the_model() -> None:
    """Masks are the model's, and allow none of the others."""
    vocab_size = 300
    desk = Desk(vocab_size=vocab_size)
    with desk.grammars:
        ranks = [desk.open(regex("[a-z ]+x")) for _ in range(12)]
        for masks in (desk.masks(None, *ranks), desk.masks(ranks[0])):
            assert masks is not None and masks.shape[1] == -(-vocab_size // 32) and masks.flags.c_contiguous
            allowed = tokens_of(masks[-1])
            assert allowed and max(allowed) < vocab_size
        text, ended = desk.write(ranks[0], seed=0)
        assert re.fullmatch("[a-z ]+x", text) or not ended


def test_it_compiles_on_the_cores_that_it_is_given() -> None:
    """Not on all that there are; nor on the one that the loop has for itself."""
    cores = {max(CORES)}
    desk = Desk(cores=cores)
    with desk.grammars:
        for number in range(4):
            desk.open(regex(f"a{number}"))
        threads = [thread.native_id for thread in desk.grammars._threads]
        for task in (*threads, *desk.processes()):
            assert task is not None and os.sched_getaffinity(task) == cores
    assert os.sched_getaffinity(0) == CORES


def test_a_tokenizer_that_does_not_fit() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        Desk(TrialOptions(str(OWN_TOKENIZER), 100, (EOS,), 1000, 64))


def test_the_end_of_sequence_of_a_tokenizer(tmp_path: Path) -> None:
    assert eos_token_ids(str(OWN_TOKENIZER)) == (EOS,)
    shutil.copy(OWN_TOKENIZER / "tokenizer.json", tmp_path)
    assert eos_token_ids(str(tmp_path)) == ()
    for named, found in (({"content": "<|user|>"}, TOKENIZER.token_to_id("<|user|>")), ("nothing", None), (None, None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert eos_token_ids(str(tmp_path)) == (() if found is None else (found,))
