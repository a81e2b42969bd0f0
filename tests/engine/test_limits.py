"""Numbers that a device cannot hold are refused before they reach it."""

from __future__ import annotations

from typing import Any

import pytest

from testbed.engine.build import _table_width
from testbed.engine.options import EngineOptions
from testbed.sampling import SamplingParams
from testbed.scenario.errors import InputError

VOCAB = 100
INF, NAN = float("inf"), float("nan")

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": INF}, "temperature is inf"),
    ({"temperature": NAN}, "temperature is nan"),
    ({"top_p": 0.0}, "top_p is 0.0; it must lie in (0, 1]"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"min_p": -0.1}, "min_p is -0.1"),
    ({"min_p": 1.1}, "min_p is 1.1"),
    ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1"),
    ({"presence_penalty": -2.1}, "presence_penalty is -2.1"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ({"top_k": 0}, "top_k is 0"),
    ({"top_k": -2}, "top_k is -2"),
    ({"top_k": 2**62 + 1}, "top_k is 4611686018427387905"),
    ({"min_new_tokens": -1}, "min_new_tokens is -1"),
    ({"min_new_tokens": 11}, "min_new_tokens is 11"),
    ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
    ({"stop_token_ids": (3, VOCAB)}, "stop_token_ids has 100; the vocabulary ends at 99"),
    ({"stop_token_ids": (-1,)}, "stop_token_ids has -1"),
    ({"logit_bias": ((3, 1.0), (VOCAB, 1.0))}, "logit_bias has token 100"),
    ({"logit_bias": ((3, -INF),)}, "logit_bias of token 3 is -inf"),
]
ACCEPTED: list[dict[str, Any]] = [
    {"temperature": 0.0, "top_p": 1.0, "min_p": 1.0, "top_k": -1},
    {"temperature": 1e9, "top_p": 1e-9, "min_p": 0.0, "top_k": 2**62},
    {"frequency_penalty": -2.0, "presence_penalty": 2.0, "repetition_penalty": 2.0, "min_new_tokens": 10},
    {"seed": -(2**63), "stop_token_ids": (0, VOCAB - 1), "logit_bias": ((0, -100.0), (VOCAB - 1, 100.0))},
    {"seed": 2**64 - 1},
]


@pytest.mark.parametrize(("fields", "expected"), REFUSED)
def test_refused(fields: dict[str, Any], expected: str) -> None:
    found = SamplingParams(**fields).problem(VOCAB, 10)
    assert found is not None and found.startswith(expected)


@pytest.mark.parametrize("fields", ACCEPTED)
def test_accepted(fields: dict[str, Any]) -> None:
    assert SamplingParams(**fields).problem(VOCAB, 10) is None


def test_a_minimum_without_a_limit_is_still_a_number() -> None:
    assert SamplingParams(min_new_tokens=2**62).problem(VOCAB) is None
    assert SamplingParams(min_new_tokens=2**62 + 1).problem(VOCAB) is not None


def test_a_page_table_that_no_int32_can_number() -> None:
    """16,384 slots: of the running requests, one of a chunked request, one to spare, one of padding."""
    options = EngineOptions("m", "float32", page_size=16, max_running_requests=16_381)
    assert _table_width(options, 131_070 * 16 - 1, 10**9) == 131_071
    with pytest.raises(InputError, match="16,381 requests of 131,073 pages") as told:
        _table_width(options, 131_072 * 16 - 1, 10**9)
    assert told.value.where == "engine.max_running_requests"
