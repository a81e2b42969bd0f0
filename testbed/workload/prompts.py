"""Prompts as segments of token streams: what is new, what is shared, what repeats an earlier turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from testbed.messages import Prompt, Segment, TokenPrompt
from testbed.scenario.workload import Prefix, SubPrefix
from testbed.tokens import oracle_key, stream_key, token_ids
from testbed.workload.draw import Floats, Uniforms, values
from testbed.workload.lengths import token_draws


def fresh(seed: int, rid: str, tokens: int) -> Segment:
    """Text that no other request has."""
    return Segment(stream_key("prompt", seed, rid), 0, tokens)


def merged(segments: Iterable[Segment]) -> list[Segment]:
    """The same tokens in as few segments as possible: empty ones left out, neighbours that go on in a stream joined."""
    out: list[Segment] = []
    for segment in segments:
        if segment.length == 0:
            continue
        if out and out[-1].key == segment.key and out[-1].start + out[-1].length == segment.start:
            out[-1] = Segment(segment.key, out[-1].start, out[-1].length + segment.length)
        else:
            out.append(segment)
    return out


def cut(segments: Iterable[Segment], tokens: int) -> list[Segment]:
    """The first ``tokens`` tokens."""
    out: list[Segment] = []
    for segment in segments:
        if tokens <= 0:
            break
        out.append(segment._replace(length=min(segment.length, tokens)))
        tokens -= segment.length
    return out


def said(
    prompt: Prompt | TokenPrompt, seed: int, rid: str, output_ids: NDArray[np.int32], vocab_size: int
) -> Prompt | TokenPrompt:
    """``prompt`` and the output that followed: what the next turn of a session begins with.

    An output that is the oracle's stays a segment; any other (a real model's) is kept as ids.
    """
    count = len(output_ids)
    key = oracle_key(seed, rid)
    if isinstance(prompt, Prompt) and np.array_equal(token_ids(key, 0, count, vocab_size), output_ids):
        return Prompt(merged([*prompt.segments, Segment(key, 0, count)]))
    return TokenPrompt(np.concatenate([prompt.ids(vocab_size), output_ids]))


def followed_by(prompt: Prompt | TokenPrompt, segments: Iterable[Segment], vocab_size: int) -> Prompt | TokenPrompt:
    """``prompt`` with more text behind it."""
    if isinstance(prompt, Prompt):
        return Prompt(merged([*prompt.segments, *segments]))
    return TokenPrompt(np.concatenate([prompt.ids(vocab_size), Prompt(list(segments)).ids(vocab_size)]))


class SharedPrefixes:
    """Draws the prefix that a prompt begins with: a group by popularity, then perhaps a group within the group."""

    def __init__(self, config: Prefix, seed: int, base_dir: Path) -> None:
        self._levels = [_Level(config, seed, ("prefix",), base_dir)]
        if config.then is not None:
            self._levels.append(_Level(config.then, seed, ("prefix", "then"), base_dir))
        self._share = config.share
        self._has_prefix: Iterator[float] = values(lambda u: u, Uniforms(seed, "prefix share"))

    def draw(self) -> list[Segment]:
        """The segments of one request's prefix; none for the part of the requests that has none."""
        path: tuple[int, ...] = ()
        segments = []
        # Every level draws for every request, so that ``share`` does not change which groups the others get.
        shared = next(self._has_prefix) < self._share
        for level in self._levels:
            path = (*path, next(level.groups))
            segments.append(level.segment(path))
        return segments if shared else []


class _Level:
    """One level of the tree of prefixes."""

    def __init__(self, config: SubPrefix, seed: int, names: tuple[str, ...], base_dir: Path) -> None:
        weights = np.arange(1, config.groups + 1, dtype=np.float64) ** -config.zipf
        popularity = np.cumsum(weights) / weights.sum()
        draws = values(partial(_ranks, popularity), Uniforms(seed, *names, "group"))
        self.groups: Iterator[int] = map(int, draws)
        self.segment = cache(self._segment)
        self._config, self._seed, self._names, self._base_dir = config, seed, names, base_dir

    def _segment(self, path: tuple[int, ...]) -> Segment:
        """The text of a group. Its length belongs to the group, whoever asks first."""
        name = "/".join(map(str, (*self._names, *path)))
        tokens = next(
            token_draws(self._config.prefix_tokens, self._seed, f"{name} tokens", self._base_dir, "prompt_tokens")
        )
        return Segment(stream_key(name, self._seed), 0, tokens)


def _ranks(popularity: Floats, u: Floats) -> Floats:
    return np.minimum(np.searchsorted(popularity, u), len(popularity) - 1).astype(np.float64)
