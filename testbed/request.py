"""A request as the scheduler holds it, and the closed set of reasons for which it ends."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from testbed.messages import GenerateRequest, Logprobs

NEVER = -1
"""A time stamp (ns) that has not happened, a slot that is not held, a step that is not known."""
ADVANCES = 1 << 40
"""Decode steps that one running batch can count. Those of micro-batch m are counted from ``m * ADVANCES`` on, so that
the number of a step says whose it is."""
NO_TOKENS = np.empty(0, np.int32)
NO_PAGES = np.empty(0, np.int32)


class FinishReason(StrEnum):
    """Why a request ended; every accepted request ends with exactly one of them."""

    LENGTH = "length"
    STOP = "stop"
    ABORT = "abort"
    ERROR = "error"


class Request:
    """A request from its admission to its end.

    ``fill_ids`` are the tokens whose KV a prefill has to provide: the prompt, and after a retraction the outputs so
    far. While the request decodes, its newer outputs lie in the slot's row of the output table.

    KV of a request that is not decoding, in tokens::

        0 ........ prefix_tokens ........ kv_tokens
        | tree's pages, locked | own pages |
    """

    __slots__ = (
        "arrival_ns",
        "cached_tokens",
        "extra_key",
        "fill_ids",
        "finish_reason",
        "first_scheduled_ns",
        "first_token_ns",
        "grammar",
        "ignore_eos",
        "in_running",
        "joined",
        "kv_tokens",
        "last_node",
        "logprobs",
        "matched",
        "max_new_tokens",
        "message",
        "old_outputs",
        "output_ids",
        "pending_prefills",
        "prefix_pages",
        "prefix_tokens",
        "priority",
        "prompt_tokens",
        "queued_ns",
        "rank",
        "retracted_at_ns",
        "retracted_before_first_ns",
        "retracted_ns",
        "retractions",
        "rid",
        "room",
        "sampled",
        "sampling",
        "segments",
        "slot",
        "status",
        "top_logprobs",
        "transfer_ns",
    )

    def __init__(self, source: GenerateRequest, rank: int, fill_ids: NDArray[np.int32], max_new_tokens: int) -> None:
        self.rid = source.rid
        self.rank = rank
        """Order of arrival at this scheduler: the request's number in the decision log."""
        self.fill_ids = fill_ids
        self.prompt_tokens = len(fill_ids)
        self.max_new_tokens = max_new_tokens
        self.grammar = source.grammar
        self.ignore_eos = source.ignore_eos and source.grammar is None
        self.priority = source.priority
        self.extra_key = source.extra_key
        self.sampling = source.sampling
        self.logprobs: Logprobs | None = None
        """What it asked for of them, as they come in."""
        self.top_logprobs = source.top_logprobs
        if source.return_logprob:
            self.logprobs = Logprobs(source.logprob_start, self.prompt_tokens)

        self.room = NEVER
        """What it is called between the two engines of a pair."""
        self.slot = NEVER
        self.prefix_tokens = 0
        """Leading tokens whose pages belong to the prefix tree (locked through ``last_node``)."""
        self.prefix_pages = NO_PAGES
        self.last_node: object = None
        self.matched = 0
        """Length of the prefix match that a policy made for this decision."""
        self.kv_tokens = 0
        """Tokens whose KV is allocated while prefilling; in the running batch the columns know."""

        self.old_outputs = 0
        """Outputs that moved into ``fill_ids`` at retractions."""
        self.sampled = False
        """Its prefill's result has been processed: the first token since (re-)admission is known."""
        self.joined = NEVER
        """The running batch's advance count when it last joined one (see RunningBatch)."""
        self.in_running = False
        self.pending_prefills = 0
        """Launched prefill chunks whose result has not been processed."""

        self.finish_reason: FinishReason | None = None
        self.message = ""
        self.status = 200
        self.output_ids = NO_TOKENS
        """Every output token, once it has ended."""

        self.arrival_ns = NEVER
        self.queued_ns = NEVER
        self.first_scheduled_ns = NEVER
        self.first_token_ns = NEVER
        self.retracted_at_ns = NEVER
        self.retracted_ns = 0
        self.retracted_before_first_ns = 0
        self.retractions = 0
        self.transfer_ns = 0
        """On the way from its prefill engine, before its first token."""
        self.cached_tokens = NEVER
        self.segments: list[tuple[int, int]] = []
        """Token times as (first advance, count) of a running batch's list of advance times; (-1 - ns, 1) for a
        prefill's token."""

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed (once: not again after a retraction)."""
        return self.logprobs is not None and self.logprobs.start >= 0 and not self.old_outputs

    @property
    def matchable_ids(self) -> NDArray[np.int32]:
        """The tokens that the prefix cache may provide: one at least is computed, and every one whose successor's
        log-probability is wanted (specification B.5)."""
        if self.wants_prompt_logprobs:
            assert self.logprobs is not None
            return self.fill_ids[: min(self.logprobs.start, len(self.fill_ids) - 1)]
        return self.fill_ids[:-1]

    def outputs_known(self, advances_done: int) -> int:
        """Output tokens whose ids are known after ``advances_done`` decode results were processed."""
        if not self.sampled:
            return self.old_outputs
        return self.old_outputs + 1 + (max(0, advances_done - self.joined) if self.in_running else 0)
