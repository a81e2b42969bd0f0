"""How the tokens of a request are drawn from the model's logits, as a client asks for it (specification H)."""

from __future__ import annotations

import math
from dataclasses import dataclass

GREEDY_BELOW = 1e-6
"""A temperature below this is greedy (specification H)."""

COUNT_MAX = 2**62
"""Larger numbers of tokens, or sums of two, do not fit into 64 bits on their way to the device."""


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """Order of application: penalties, grammar mask, logit bias, minimum length, temperature, then top-k, top-p and
    min-p, each of which looks at the whole distribution.

    The default is greedy, as benchmark clients send; a server fills in OpenAI's defaults.
    """

    temperature: float = 0.0
    top_k: int = -1
    """-1: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than this share of the most likely one are out."""
    frequency_penalty: float = 0.0
    """Subtracted for each time that the token is among the outputs."""
    presence_penalty: float = 0.0
    """Subtracted once when the token is among the outputs."""
    repetition_penalty: float = 1.0
    """Logits of tokens of prompt and output are divided by it where positive, multiplied where negative."""
    min_new_tokens: int = 0
    """End-of-sequence and stop tokens are out until there are so many outputs."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    seed: int | None = None
    """None: one of its own, from the run's seed and the request's id."""
    stop_token_ids: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether a penalty looks at the tokens so far."""
        return bool(self.frequency_penalty or self.presence_penalty) or self.repetition_penalty != 1.0

    def problem(self, vocab_size: int, max_new_tokens: int | None = None) -> str | None:
        """What is wrong with these values, in words for the client; None when nothing is."""
        ranges = (
            ("temperature", self.temperature, 0.0, math.inf, True),
            ("top_p", self.top_p, 0.0, 1.0, False),
            ("min_p", self.min_p, 0.0, 1.0, True),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0, True),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0, True),
            ("repetition_penalty", self.repetition_penalty, 0.0, 2.0, False),
        )
        for name, value, low, high, closed in ranges:
            inside = (low <= value if closed else low < value) and value <= high and not math.isinf(value)
            if not inside:
                return f"{name} is {value}; it must lie in {'[' if closed else '('}{low:g}, {high:g}]"
        if self.top_k != -1 and not 1 <= self.top_k <= COUNT_MAX:
            return f"top_k is {self.top_k}; it must be -1 (all) or lie in [1, {COUNT_MAX}]"
        if not 0 <= self.min_new_tokens <= (COUNT_MAX if max_new_tokens is None else min(max_new_tokens, COUNT_MAX)):
            return f"min_new_tokens is {self.min_new_tokens}; it must lie between 0 and max_new_tokens"
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            return f"seed is {self.seed}; it must fit into 64 bits"
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                return f"stop_token_ids has {token}; the vocabulary ends at {vocab_size - 1}"
        for token, bias in self.logit_bias:
            if not 0 <= token < vocab_size:
                return f"logit_bias has token {token}; the vocabulary ends at {vocab_size - 1}"
            if not math.isfinite(bias):
                return f"logit_bias of token {token} is {bias}; it must be finite"
        return None


DEFAULT_SAMPLING = SamplingParams()
