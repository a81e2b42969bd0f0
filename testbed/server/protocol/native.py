"""SGLang's own addresses: ``/generate``, and those that look after the server.

Shapes as in SGLang 0.5 (``managers/io_struct.py``, ``managers/tokenizer_manager.py``, ``entrypoints/http_server.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from testbed.messages import AbortRequest, TextOptions
from testbed.server.protocol.body import read_json
from testbed.server.protocol.errors import ApiError
from testbed.server.protocol.fields import (
    AtMost,
    Fields,
    Name,
    NoOrMoreTokens,
    OneOrMany,
    Priority,
    Prompts,
    Seed,
    TopLogprobs,
)
from testbed.server.protocol.generation import Call, Generation, Served, check_amount, check_grammar
from testbed.server.protocol.openai import SamplingFields, cache_key, one_grammar, validated
from testbed.server.protocol.responses import Choice, TokenLogprob, event, finish_reason, finite

DEFAULT_MAX_NEW_TOKENS = 128
"""SGLang's (``sampling/sampling_params.py``)."""


class NativeSampling(SamplingFields):
    """``sampling_params``."""

    max_new_tokens: NoOrMoreTokens = DEFAULT_MAX_NEW_TOKENS
    min_new_tokens: NoOrMoreTokens = 0
    sampling_seed: Seed | None = None


class GenerateBody(Fields):
    """The body of ``/generate``: ``text`` or ``input_ids``, one or many."""

    text: Prompts | None = None
    input_ids: Prompts | None = None
    sampling_params: Annotated[list[NativeSampling], AtMost("prompts"), OneOrMany()] = Field(
        default_factory=lambda: [NativeSampling()]
    )
    return_logprob: bool = False
    logprob_start_len: Annotated[int, Field(ge=-1), AtMost("prompt_tokens")] = -1
    top_logprobs_num: TopLogprobs = 0
    stream: bool = False
    rid: Annotated[list[Name], AtMost("prompts"), OneOrMany()] = Field([])
    priority: Priority | None = None
    extra_key: Name = ""
    cache_salt: Name = ""


class AbortBody(Fields):
    """The body of ``/abort_request``."""

    rid: Name = ""
    abort_all: bool = False


def parse_generate(body: bytes, served: Served) -> Call:
    """What a body of ``/generate`` asks for. Raises ApiError."""
    data = read_json(body, served.limits)
    request = validated(GenerateBody, data, served)
    if (request.text is None) == (request.input_ids is None):
        raise ApiError("text or input_ids is required, and not both.", param="text")
    prompts = request.text if request.text is not None else request.input_ids
    assert prompts is not None
    given = data.get("text") if request.text is not None else data["input_ids"]
    batch = isinstance(given, list) and isinstance(given[0], str | list)
    params = request.sampling_params
    if len(params) != len(prompts):
        if isinstance(data.get("sampling_params"), list):
            raise ApiError("sampling_params must be one object, or one for each prompt.", param="sampling_params")
        params = params * len(prompts)
    if request.rid and (len(request.rid) != len(prompts) or len(dict.fromkeys(request.rid)) < len(prompts)):
        raise ApiError("rid must be one id for each prompt, no two the same.", param="rid")
    generations = tuple(_generation(request, *pair) for pair in zip(params, prompts, strict=True))
    check_amount(generations, served, "sampling_params.max_new_tokens")
    return Call(
        model=served.names[0],
        generations=generations,
        stream=request.stream,
        rids=tuple(request.rid),
        batch=batch,
        prompt_name="input_ids" if request.text is None else "text",
        logprobs_name="return_logprob",
    )


def parse_abort(body: bytes, served: Served) -> AbortRequest:
    """What a body of ``/abort_request`` asks for. Raises ApiError."""
    request = validated(AbortBody, read_json(body, served.limits), served)
    if not request.rid and not request.abort_all:
        raise ApiError("rid is required, or abort_all: true.", param="rid")
    return AbortRequest("" if request.abort_all else request.rid, request.abort_all)


def _generation(request: GenerateBody, params: NativeSampling, prompt: Any) -> Generation:
    if params.min_new_tokens > params.max_new_tokens:
        message = "sampling_params.min_new_tokens must be at most max_new_tokens."
        raise ApiError(message, param="sampling_params.min_new_tokens")
    generation = Generation(
        prompt=prompt,
        add_special_tokens=True,
        sampling=params.sampling(params.sampling_seed, params.min_new_tokens),
        max_new_tokens=params.max_new_tokens,
        text=TextOptions(
            stop=params.stop,
            include_stop=params.no_stop_trim,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        ),
        n=params.n,
        ignore_eos=params.ignore_eos,
        grammar=one_grammar(params.grammars()),
        priority=request.priority,
        extra_key=cache_key(request.cache_salt, request.extra_key),
    )
    check_grammar(generation)
    if request.return_logprob:
        generation = replace(
            generation,
            return_logprob=True,
            top_logprobs=request.top_logprobs_num,
            logprob_start=request.logprob_start_len,
        )
    return generation


def generate_reply(
    rid: str,
    choice: Choice,
    output_ids: Sequence[int],
    prompt_tokens: int,
    cached_tokens: int,
    latency_s: float | None = None,
    prompt_logprobs: Sequence[TokenLogprob] | None = None,
) -> dict[str, object]:
    """One result of ``/generate``; in a stream a chunk, which has all text, ids and log-probabilities so far.

    ``latency_s``: from arrival to end, told with the last. ``prompt_logprobs``: from ``logprob_start_len`` on.
    """
    info: dict[str, object] = {
        "id": rid,
        "finish_reason": _finish(choice, len(output_ids)),
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(output_ids),
        "cached_tokens": cached_tokens,
    }
    if latency_s is not None:
        info["e2e_latency"] = latency_s
    if choice.logprobs is not None:
        for side, tokens in (("input", prompt_logprobs or ()), ("output", choice.logprobs)):
            info[f"{side}_token_logprobs"] = [[finite(token.logprob), token.token_id, None] for token in tokens]
            if any(token.top for token in tokens):
                info[f"{side}_top_logprobs"] = [
                    [[finite(logprob), token_id, None] for token_id, _, logprob in token.top] or None
                    for token in tokens
                ]
    return {"text": choice.text, "output_ids": list(output_ids), "meta_info": info}


def generate_event(reply: Mapping[str, object], index: int | None) -> bytes:
    """A chunk of a stream; ``index`` is that of the prompt or choice where there are several."""
    return event(dict(reply) if index is None else {**reply, "index": index})


def _finish(choice: Choice, output_tokens: int) -> dict[str, object] | None:
    reason = finish_reason(choice.reason)
    if reason is None:
        return None
    if reason == "length":
        return {"type": "length", "length": output_tokens}
    if reason == "stop":
        return {"type": "stop", "matched": choice.matched}
    return {"type": "abort", "message": choice.message or "Aborted", "status_code": choice.status}


def server_info(settings: Mapping[str, object], state: Mapping[str, object], version: str) -> dict[str, object]:
    """``/get_server_info``: the server's settings, beside them what the scheduler says of itself.

    ``state``: the answer to ``GetInternalState``.
    """
    return {
        **settings,
        "max_total_num_tokens": state.get("max_total_num_tokens"),
        "internal_states": [dict(state)],
        "version": version,
    }


def load(states: Sequence[Mapping[str, int | float | str]]) -> list[dict[str, object]]:
    """``/get_load``: for each scheduler the requests in it, those of them that wait, and the tokens that are in use."""
    return [
        {
            "dp_rank": rank,
            "num_reqs": int(state["running"]) + int(state["waiting"]),
            "num_waiting_reqs": int(state["waiting"]),
            "num_tokens": used_tokens(state),
        }
        for rank, state in enumerate(states)
    ]


def used_tokens(state: Mapping[str, int | float | str]) -> int:
    """Tokens of the pool that requests hold: neither free nor only cached."""
    return int(state["max_total_num_tokens"]) - int(state["free_tokens"]) - int(state["evictable_tokens"])


def model_info(path: str, context_length: int) -> dict[str, object]:
    """``/get_model_info``."""
    return {
        "model_path": path,
        "tokenizer_path": path,
        "is_generation": True,
        "preferred_sampling_params": None,
        "max_model_len": context_length,
    }
