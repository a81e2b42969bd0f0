"""Streamed text, joined, equals the text in one and ``transformers``' decode, for random tokens and all stop rules.

A third of the sequences are random ids, a third texts in all scripts, emoji and any code points, a third such texts
with random ids among them: with and without special tokens, cut into random pushes, most of them under stop strings
that lie in the text, overlap, or break off, for tokenizers of eight kinds. Then every code point of Unicode goes
through, a token a byte. The details count what the library's own stream makes of the sequences without stop strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tokenizers.decoders import DecodeStream

from testbed.messages import TextOptions
from testbed.server.detokenize import CHARACTER_BYTES, TextStream, decode_all
from tests.evidence.evidence import Evidence
from tests.server import page
from tests.server.cases import Case, Reference
from tests.server.kinds import KINDS

SEED = 0
POINTS = 4096
"""Code points of one stream."""


@dataclass
class Counts:
    """What was compared."""

    sequences: int = 0
    pushes: int = 0
    characters: int = 0
    stopped: int = 0
    broken: int = 0
    """Sequences with U+FFFD in their text."""
    unequal: int = 0
    library_unequal: int = 0


def library_streams_it(ours: Reference, case: Case) -> bool:
    """Does ``DecodeStream`` give the text of the whole?"""
    stream = DecodeStream(skip_special_tokens=case.options.skip_special_tokens)
    try:
        parts = [stream.step(ours.tokenizer, token) or "" for token in case.token_ids]
    except Exception:  # the library raises nothing more special
        return False
    return "".join(parts) == ours.decode(case.token_ids, case.options.skip_special_tokens)


def compare(kind: str, sequences: int, counts: Counts) -> list[str]:
    """Random sequences of one tokenizer; what differed."""
    ours, random, differ = Reference(KINDS[kind]()), Random(f"{SEED} {kind}"), []
    for index in range(sequences):
        case = ours.draw(random)
        text, stopped = expected = ours.expected(case)
        found = ours.streamed(case), decode_all(ours.vocabulary, [], case.token_ids, case.options)
        if found != (expected, expected):
            differ.append(f"{kind}, sequence {index}: {case.token_ids}, {case.options}")
        counts.sequences += 1
        counts.pushes += len(case.parts)
        counts.characters += len(text)
        counts.stopped += stopped is not None
        counts.broken += "\ufffd" in text
        counts.library_unequal += not library_streams_it(ours, case)
    return differ


def every_code_point(smoke: bool) -> tuple[int, int]:
    """(code points, code points in streams that differ): each in its bytes, one token a byte, through our own."""
    ours = Reference(KINDS["our own"]())
    token_of = {byte: ours.tokenizer.token_to_id(character) for character, byte in CHARACTER_BYTES.items()}
    points = [point for point in range(0, 0x110000, 16 if smoke else 1) if not 0xD800 <= point < 0xE000]
    unequal = 0
    for begin in range(0, len(points), POINTS):
        text = "".join(map(chr, points[begin : begin + POINTS]))
        stream = TextStream(ours.vocabulary, [], TextOptions())
        chunks = [stream.push((token_of[byte],)) for byte in text.encode()]
        unequal += len(text) * ("".join([*chunks, stream.finish()]) != text)
    return len(points), unequal


def check(smoke: bool) -> Evidence:
    """All kinds, then all code points."""
    load = page.busy()
    wanted, counts = (500 if smoke else 10_000), Counts()
    differ = [one for kind in KINDS for one in compare(kind, wanted // len(KINDS) + 1, counts)]
    counts.unequal = len(differ)
    points, unequal = every_code_point(smoke)
    evidence = Evidence(
        figure=f"{counts.unequal} of {counts.sequences:,} sequences and {unequal} of {points:,} code points differ; "
        f"{counts.stopped:,} ended by a stop string, {counts.broken:,} with broken characters",
        bar=f"streamed = in one = transformers' decode for all of at least {wanted:,} sequences",
        passed=not differ and not unequal and counts.sequences >= wanted,
        details=(
            f"{len(KINDS)} tokenizers: {'; '.join(KINDS)}",
            f"{counts.pushes:,} pushes, {counts.characters:,} characters",
            f"tokenizers.decoders.DecodeStream gives another text, or none, for {counts.library_unequal:,} sequences",
            *differ[:20],
        ),
    )
    seed = f"{SEED} and the name of each tokenizer"
    return evidence if smoke else page.keep("serve.2", evidence, seed=seed, load=load)
