"""What a request comes down to, whichever protocol it was written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from testbed.messages import GrammarSpec, TextOptions
from testbed.sampling import SamplingParams
from testbed.server.protocol.chat import ChatTemplate
from testbed.server.protocol.errors import ApiError
from testbed.server.protocol.limits import Limits
from testbed.server.protocol.tools import ToolUse


@dataclass(frozen=True, slots=True)
class Served:
    """What this server serves, as far as requests are checked against it."""

    names: tuple[str, ...]
    """By which the model may be called; the first is what replies say."""
    vocab_size: int
    context_tokens: int
    """Prompt and output together."""
    template: ChatTemplate | None = None
    """None: the model cannot chat."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """``n`` continuations of one prompt."""

    prompt: str | NDArray[np.int32]
    """Text still to be tokenised, or token ids, int32 [tokens]."""
    add_special_tokens: bool
    """Whether the tokenizer adds its own (a beginning of sequence) to text; a chat template has put them in."""
    sampling: SamplingParams
    max_new_tokens: int | None
    """None: as many as fit."""
    text: TextOptions
    n: int = 1
    ignore_eos: bool = False
    grammar: GrammarSpec | None = None
    priority: int | None = None
    extra_key: str = ""
    """Name space of the prefix cache."""
    return_logprob: bool = False
    top_logprobs: int = 0
    logprob_start: int = -1
    """Log-probabilities of the prompt's tokens behind this position; -1: none."""
    echo: bool = False
    """Whether the reply begins with the prompt's text."""

    def outputs(self, room: int) -> int:
        """Output tokens of a choice, at most, where ``room`` fit."""
        return room if self.max_new_tokens is None else min(self.max_new_tokens, room)

    def sampling_of(self, choice: int) -> SamplingParams:
        """How choice ``choice`` of ``n`` is drawn: each with a seed of its own, the first with the one asked for."""
        if self.sampling.seed is None or choice == 0:
            return self.sampling
        return replace(self.sampling, seed=(self.sampling.seed + choice) % 2**63)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One HTTP request: what to generate and in which form the answer is wanted.

    Choice ``i`` of prompt ``p`` has the index ``p * n + i`` in the answer, as OpenAI numbers them.
    """

    model: str
    """The name by which the client called the model; replies repeat it."""
    generations: tuple[Generation, ...]
    stream: bool = False
    include_usage: bool = False
    """A stream ends with a chunk of usage."""
    continuous_usage: bool = False
    """Every chunk of a stream has the usage so far."""
    cached_details: bool = False
    """Where cached tokens were found is told, as SGLang does."""
    tools: ToolUse | None = None
    rids: tuple[str, ...] = ()
    """Ids that the client chose, one a prompt; empty: the server's own."""
    batch: bool = False
    """Native only: the answer is a list, since the prompts were one."""
    token_ids: bool = False
    """OpenAI's only: the ids of the output are told beside its text, as vLLM does (``return_token_ids``)."""
    prompt_name: str = "prompt"
    logprobs_name: str = "logprobs"
    """What the protocol calls them, for errors."""


def check_amount(generations: tuple[Generation, ...], served: Served, name: str) -> None:
    """Whether all choices together are not too many. ``name``: what the protocol calls the number of tokens.

    Raises ApiError.
    """
    limits = served.limits
    choices = sum(generation.n for generation in generations)
    if choices > limits.choices:
        raise ApiError(f"n times the number of prompts must be at most {limits.choices}.", param="n")
    tokens = sum(generation.n * generation.outputs(served.context_tokens) for generation in generations)
    if choices > 1 and tokens > limits.asked_tokens:
        message = f"{name} times the number of choices must be at most {limits.asked_tokens}; ask for fewer tokens."
        raise ApiError(message, param=name)


def check_grammar(generation: Generation) -> None:
    """Refuse what cannot be had together with a grammar. Raises ApiError."""
    if generation.grammar is None:
        return
    if generation.ignore_eos:
        raise ApiError("ignore_eos cannot be combined with a grammar: the grammar ends the text.", param="ignore_eos")
    if generation.sampling.min_new_tokens:
        message = "min_tokens cannot be combined with a grammar: the grammar says when the text ends."
        raise ApiError(message, param="min_tokens")


def check_prompts(prompts: Sequence[NDArray[np.int32]], call: Call, served: Served) -> None:
    """Whether the tokenised prompts, int32 [tokens] each, can be served with what is asked of them. Raises ApiError."""
    for prompt, generation in zip(prompts, call.generations, strict=True):
        _check_prompt(prompt, generation, call.prompt_name, served)
    pairs = zip(prompts, call.generations, strict=True)
    values = sum(_logprobs(len(prompt), generation, served) for prompt, generation in pairs)
    most = served.limits.logprob_values
    if values > most:
        message = (
            f"{call.logprobs_name} asks for {values} values, 1 and the most likely ones for each output token of each "
            f"choice, and the prompt's; at most {most} are allowed. Ask for fewer tokens."
        )
        raise ApiError(message, param=call.logprobs_name)


def _check_prompt(prompt: NDArray[np.int32], generation: Generation, name: str, served: Served) -> None:
    """Whether one fits into the context with its output, as OpenAI words it, and the model has its tokens."""
    wanted = generation.max_new_tokens or 1
    if len(prompt) == 0:
        raise ApiError(f"{name} has no tokens; send some text.", param=name)
    if len(prompt) + wanted > served.context_tokens:
        message = (
            f"The context takes {served.context_tokens} tokens, prompt and output; the prompt has {len(prompt)} and "
            f"{wanted} were asked for. Shorten the prompt or ask for fewer tokens."
        )
        raise ApiError(message, param=name, code="context_length_exceeded")
    if prompt.max() >= served.vocab_size:  # some tokenizers have more tokens than their models
        message = f"{name} has text that is token {prompt.max()} of the tokenizer; the model has {served.vocab_size}."
        raise ApiError(message, param=name)


def _logprobs(prompt_tokens: int, generation: Generation, served: Served) -> int:
    """Log-probabilities that all choices of a prompt may come to."""
    if not generation.return_logprob:
        return 0
    outputs = generation.outputs(served.context_tokens - prompt_tokens)
    told = prompt_tokens - generation.logprob_start if generation.logprob_start >= 0 else 0
    return generation.n * (outputs * (1 + generation.top_logprobs) + max(told, 0))
