"""What every request of a workload has in common: what the scheduler is told, and that it fits the context."""

from __future__ import annotations

from math import ceil

from testbed.messages import GenerateRequest, Prompt, TokenPrompt
from testbed.sampling import SamplingParams
from testbed.scenario.errors import InputError
from testbed.scenario.workload import WorkloadConfig
from testbed.workload.base import TimedRequest


class Terms:
    """Makes requests out of prompts and true output lengths."""

    def __init__(self, config: WorkloadConfig, context_length: int, bound_by: str) -> None:
        if context_length < 2:
            raise InputError(
                f"a context of {context_length} tokens",
                where=bound_by,
                remedy="at least 2: one token of prompt, one of output",
            )
        self.context_length = context_length
        self.bound_by = bound_by
        told = config.max_new_tokens
        self._fixed = told if isinstance(told, int) else None
        self._ratio = told["ratio"] if isinstance(told, dict) else 1.0
        self._sampling = SamplingParams(**config.sampling.model_dump())
        self._ignore_eos = told == "output" if config.ignore_eos is None else config.ignore_eos

    @property
    def limit(self) -> str:
        """``context_length`` in words, with the field that sets it."""
        return f"the {self.context_length:,} tokens that {self.bound_by} allows"

    def fits(self, prompt_tokens: int, output_tokens: int) -> bool:
        """Whether prompt and whole output are no longer than the context."""
        return prompt_tokens + output_tokens <= self.context_length

    def fitted(self, prompt_tokens: int, output_tokens: int) -> tuple[int, int]:
        """The lengths cut to the context: the prompt first, the output only where it alone would fill the context."""
        output_tokens = min(output_tokens, self.context_length - 1)
        return min(prompt_tokens, self.context_length - output_tokens), output_tokens

    def request(
        self,
        arrival_ns: int,
        rid: str,
        prompt: Prompt | TokenPrompt,
        output_tokens: int,
        session: str = "",
        tenant: str = "",
        priority: int | None = None,
        iteration: int = -1,
    ) -> TimedRequest:
        """A request whose true length is ``output_tokens``. It ends there, or at what the scheduler was told."""
        told = self._fixed if self._fixed is not None else ceil(min(output_tokens * self._ratio, 2.0**62))
        message = GenerateRequest(rid, prompt, told, self._ignore_eos, priority, sampling=self._sampling)
        return TimedRequest(arrival_ns, message, min(output_tokens, told), session, tenant, iteration)
