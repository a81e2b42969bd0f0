"""Random requests to detokenise, and what their text must be, found in the simplest way."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from testbed.messages import TextOptions
from testbed.server.detokenize import TextStream, Vocabulary
from tests.server.kinds import SCRIPTS

CODE_POINTS = (0x80, 0x800, 0x10000, 0x110000)
"""Ends of the ranges that take one to four bytes."""


@dataclass(frozen=True)
class Case:
    """A request's output."""

    token_ids: list[int]
    parts: list[list[int]]
    """The same, cut into pushes."""
    options: TextOptions


class Reference:
    """A tokenizer with its vocabulary here and in ``transformers``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self.theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """What ``transformers`` decodes."""
        text = self.theirs.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def draw(self, random: Random) -> Case:
        """A random case: tokens of no text at all, of a text, or of a text with wrong ones among them."""
        size = self.tokenizer.get_vocab_size()
        anything = [random.randrange(size + 2) for _ in range(random.randrange(30))]  # two ids are of no token
        kind = random.randrange(3)
        token_ids = anything if kind == 0 else self.tokenizer.encode(random_text(random), add_special_tokens=False).ids
        if kind == 2:
            for token in anything[:6]:
                token_ids.insert(random.randrange(len(token_ids) + 1), token)
        skip, include = random.random() < 0.7, random.random() < 0.3
        stop = random_stops(self.decode(token_ids, skip), random)
        options = TextOptions(stop=stop, include_stop=include, skip_special_tokens=skip)
        return Case(token_ids, cut(token_ids, random), options)

    def expected(self, case: Case) -> tuple[str, str | None]:
        """(text, stop string), from the whole text."""
        return searched(self.decode(case.token_ids, case.options.skip_special_tokens), case.options)

    def streamed(self, case: Case) -> tuple[str, str | None]:
        """(text, stop string), as a stream sends them."""
        stream = TextStream(self.vocabulary, [], case.options)
        text = "".join([*map(stream.push, case.parts), stream.finish()])
        return text, stream.stopped


def searched(text: str, options: TextOptions) -> tuple[str, str | None]:
    """The stop rules, on a whole text."""
    places = [(text.find(stop), order) for order, stop in enumerate(options.stop) if stop in text]
    if not places:
        return text, None
    begin, order = min(places)
    stop = options.stop[order]
    return text[: begin + len(stop)] if options.include_stop else text[:begin], stop


def random_text(random: Random) -> str:
    """Pieces of texts in all scripts, and any characters that there are."""
    parts = []
    for _ in range(random.randrange(4)):
        if random.random() < 0.6:
            sample = random.choice(list(SCRIPTS.values()))
            begin = random.randrange(len(sample))
            parts.append(sample[begin : begin + random.randrange(40)])
        else:
            code_points = [random.randrange(random.choice(CODE_POINTS)) for _ in range(random.randrange(6))]
            parts.append("".join(chr(point) for point in code_points if not 0xD800 <= point < 0xE000))
    return " ".join(parts)


def random_stops(text: str, random: Random) -> tuple[str, ...]:
    """Pieces of the text, also longer than they are in it or overlapping one another."""
    stops = []
    for _ in range(random.randrange(4) if text else 0):
        begin = random.randrange(len(text))
        stop = text[begin : begin + random.randrange(1, 9)]
        stops += [stop, stop[1:-1]] if random.random() < 0.2 and len(stop) > 2 else [stop]
        if random.random() < 0.4:
            stops[-1] += random.choice("x \n\ufffd")
    return tuple(stops)


def cut(token_ids: list[int], random: Random) -> list[list[int]]:
    """In parts of one or a few."""
    parts, begin = [], 0
    while begin < len(token_ids):
        end = begin + random.choice((1, 1, 1, 2, 5))
        parts.append(token_ids[begin:end])
        begin = end
    return parts
