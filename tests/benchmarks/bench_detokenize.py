"""Speed of incremental detokenisation: thousands of streams of one process, a token each in turn, as a step sends them.

Nothing passes or fails by time, as in ``bench_simulate``."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from testbed.messages import TextOptions
from testbed.server.detokenize import TextStream, Vocabulary
from tests.benchmarks.bench_simulate import in_references
from tests.server.kinds import KINDS, SCRIPTS

STREAMS, TOKENS = 2000, 50
STOPS = {"no stop": (), "one stop": ("\n\n",), "16 stops": tuple(f"{end}{i}</stop>" for i in range(8) for end in " \n")}


@pytest.mark.parametrize("text", ["prose", "any tokens"])
@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("kind", ["our own", "llama"])
def bench_streams(benchmark: Any, kind: str, stops: str, text: str) -> None:
    """``extra_info`` has the tokens a second."""
    tokenizer, random = KINDS[kind](), Random(0)
    vocabulary, options = Vocabulary(tokenizer), TextOptions(stop=STOPS[stops])
    ids = tokenizer.encode(SCRIPTS["code"] * 9).ids if text == "prose" else range(tokenizer.get_vocab_size())
    begins = [random.randrange(len(ids) - TOKENS) for _ in range(STREAMS)]

    def steps() -> None:
        streams = [TextStream(vocabulary, (), options) for _ in begins]
        for place in range(TOKENS):
            for stream, begin in zip(streams, begins, strict=True):
                stream.push((ids[begin + place],))
        for stream in streams:
            stream.finish()

    benchmark.group = "detokenise"
    benchmark.pedantic(steps, rounds=3, warmup_rounds=1)
    benchmark.extra_info["tokens_a_second"] = round(STREAMS * TOKENS / benchmark.stats.stats.min)
    in_references(benchmark, STREAMS * TOKENS)
