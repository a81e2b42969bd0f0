"""Log-probabilities of a step, kept with the requests that asked for them."""

from __future__ import annotations

from testbed.batch import Batch, StepLogprobs
from testbed.request import NEVER, Request


def keep_logprobs(batch: Batch, found: StepLogprobs) -> None:
    """Store what a result brought, before the result is applied: rows whose token will be dropped are passed over."""
    begin = 0
    for row, (request, prefix, new_tokens, last) in enumerate(batch.prefills):
        if request.logprobs is not None and request.slot != NEVER and request.finish_reason is None:
            if len(found.prompt):
                _keep_prompt(request, prefix, found, begin, new_tokens)
            if last and request.pending_prefills == 1 and request.max_new_tokens:
                _keep_token(request, row, found)
        begin += new_tokens
    first = len(batch.prefills)
    for row, request in enumerate(batch.decodes, first):
        if request.logprobs is not None and request.in_running and request.finish_reason is None:
            _keep_token(request, row, found)


def _keep_prompt(request: Request, prefix: int, found: StepLogprobs, begin: int, new_tokens: int) -> None:
    """New token i stands at ``prefix + i``; its logits speak of the prompt token behind it."""
    assert request.logprobs is not None
    prompt = request.logprobs.prompt
    first = max(prefix, request.logprobs.start)
    end = min(prefix + new_tokens, len(prompt) - 1)
    if request.wants_prompt_logprobs and first < end:
        prompt[first + 1 : end + 1] = found.prompt[begin + first - prefix : begin + end - prefix]


def _keep_token(request: Request, row: int, found: StepLogprobs) -> None:
    logprobs = request.logprobs
    assert logprobs is not None
    logprobs.tokens.append(float(found.tokens[row]))
    if request.top_logprobs:
        k = request.top_logprobs
        logprobs.top.append((found.top_ids[row, :k].copy(), found.top[row, :k].copy()))
