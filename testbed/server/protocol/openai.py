"""``/v1/completions`` and ``/v1/chat/completions``: from a body to what is to be generated.

The fields are OpenAI's, with those that SGLang and vLLM add (SGLang's names where both have one: SGLang 0.5,
``entrypoints/openai/protocol.py``). What would change the output and cannot be honoured is refused by name; the rest is
ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PlainValidator, StringConstraints, ValidationError, WithJsonSchema

from testbed.messages import GrammarSpec, TextOptions
from testbed.sampling import SamplingParams
from testbed.server.protocol.body import read_json
from testbed.server.protocol.errors import ApiError, of_validation, unknown_model, words
from testbed.server.protocol.fields import (
    AtMost,
    Biases,
    Choices,
    Content,
    Fields,
    GrammarText,
    Name,
    NoOrMoreTokens,
    Options,
    OutputTokens,
    Penalty,
    PositiveShare,
    Priority,
    Prompts,
    Repetition,
    SchemaText,
    Seed,
    Share,
    StopIds,
    StopStrings,
    Temperature,
    TopK,
    TopLogprobs,
)
from testbed.server.protocol.generation import Call, Generation, Served, check_amount, check_grammar
from testbed.server.protocol.tools import ToolUse, forced_schema

Model = TypeVar("Model", bound=Fields)

DEFAULT_MAX_TOKENS = 16
"""Of a completion (OpenAI's API reference). A chat has none: as many as fit."""

FIM = "put everything into the prompt"
TEXT_ONLY = "this server takes text only"
UNSUPPORTED = {
    "suffix": FIM,
    "functions": "use tools",
    "function_call": "use tool_choice",
    "stop_regex": "use stop",
    "guided_json": "use response_format or json_schema",
    "guided_regex": "use regex",
    "guided_grammar": "use ebnf",
    "guided_choice": "use regex",
    "structured_outputs": "use response_format, regex or ebnf",
    "structural_tag": "use response_format, regex or ebnf",
    "chat_template": "the model's own is used",
    "continue_final_message": "use /v1/completions",
    "input_ids": "use /v1/completions with token ids as the prompt",
    "custom_logit_processor": "use logit_bias",
    "logits_processors": "use logit_bias",
    "allowed_token_ids": "use logit_bias",
    "bad_words": "use logit_bias",
    "use_beam_search": "use n",
    "prompt_logprobs": "use echo with logprobs",
    "truncate_prompt_tokens": "shorten the prompt",
    "lora_path": "this server has one model",
    "session_params": "send the whole prompt",
    "return_hidden_states": "only tokens, text and log-probabilities are returned",
    "audio": TEXT_ONLY,
    "image_data": TEXT_ONLY,
    "audio_data": TEXT_ONLY,
    "video_data": TEXT_ONLY,
}
"""Fields that would change the reply, with what to do instead. Empty, false and zero values are let through."""


class JsonSchemaFormat(Fields):
    """``response_format.json_schema``."""

    name: Name | None = None
    schema_: Annotated[SchemaText, Field(alias="schema")]


class ResponseFormat(Fields):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StreamOptions(Fields):
    """``stream_options``."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(Fields):
    """How tokens are drawn and where the text ends: the same in every protocol."""

    temperature: Temperature = 1.0
    top_p: PositiveShare = 1.0
    top_k: TopK = -1
    min_p: Share = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Repetition = 1.0
    logit_bias: Biases = ()
    n: Choices = 1
    stop: StopStrings = ()
    stop_token_ids: StopIds = ()
    no_stop_trim: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    regex: GrammarText | None = None
    ebnf: GrammarText | None = None
    json_schema: SchemaText | None = None

    def grammars(self) -> list[GrammarSpec]:
        """Those asked for; more than one is an error."""
        asked = (("json_schema", self.json_schema), ("regex", self.regex), ("ebnf", self.ebnf))
        return [GrammarSpec(kind, text) for kind, text in asked if text is not None]  # type: ignore[arg-type]

    def sampling(self, seed: int | None, min_new_tokens: int) -> SamplingParams:
        """As the engine takes it."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            min_new_tokens=min_new_tokens,
            logit_bias=self.logit_bias,
            seed=seed,
            stop_token_ids=self.stop_token_ids,
        )


class OpenAIFields(SamplingFields):
    """What both endpoints share."""

    model: Name | None = None
    seed: Seed | None = None
    min_tokens: NoOrMoreTokens = 0
    response_format: ResponseFormat | None = None
    include_stop_str_in_output: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    priority: Priority | None = None
    extra_key: Name = ""
    cache_salt: Name = ""
    rid: Name | None = None
    user: Name | None = None
    return_cached_tokens_details: bool = False
    return_token_ids: bool = False


class CompletionRequest(OpenAIFields):
    """The body of ``/v1/completions``."""

    prompt: Prompts
    max_tokens: OutputTokens = DEFAULT_MAX_TOKENS
    best_of: Choices | None = None
    echo: bool = False
    logprobs: TopLogprobs | None = None


class FunctionCall(Fields):
    """``messages[].tool_calls[].function``."""

    name: Name
    arguments: Annotated[str, AtMost("prompt_chars")] = ""


class ToolCallField(Fields):
    """``messages[].tool_calls[]``."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Fields):
    """``messages[]``."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    tool_call_id: Name | None = None
    tool_calls: Annotated[list[ToolCallField], AtMost("tools")] | None = None

    def rendered(self) -> dict[str, Any]:
        """As chat templates expect it: arguments of calls as objects, no absent fields but the content."""
        made: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name is not None:
            made["name"] = self.name
        if self.tool_call_id is not None:
            made["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return made


class Function(Fields):
    """``tools[].function``."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Annotated[str, AtMost("tools_bytes")] | None = None
    parameters: Annotated[dict[str, Any], AtMost("tools_bytes")] | None = None


class Tool(Fields):
    """``tools[]``."""

    type: Literal["function"]
    function: Function

    def rendered(self) -> dict[str, Any]:
        """As chat templates expect it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


def _tool_choice(value: Any) -> str:
    """``none``, ``auto`` or ``required``; or the name of a function behind ``function:``."""
    if value in ("none", "auto", "required"):
        return str(value)
    function = value.get("function") if isinstance(value, Mapping) and value.get("type") == "function" else None
    if isinstance(function, Mapping) and isinstance(function.get("name"), str):
        return f"function:{function['name']}"
    raise words('must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}')


_NAMED_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 64}},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
ToolChoice = Annotated[
    str,
    PlainValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED_TOOL]}),
]


class ChatRequest(OpenAIFields):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1), AtMost("messages")]
    max_tokens: OutputTokens | None = None
    max_completion_tokens: OutputTokens | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], AtMost("tools")] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: Literal[True] = True
    chat_template_kwargs: Options | None = None


def parse_completion(body: bytes, served: Served) -> Call:
    """What a body of ``/v1/completions`` asks for. Raises ApiError."""
    request = validated(CompletionRequest, read_json(body, served.limits), served)
    if request.best_of is not None and request.best_of != request.n:
        raise ApiError("best_of must be left out or equal to n; ask for n choices.", param="best_of")
    wants_logprobs = request.logprobs is not None
    shared = _generation(request, request.max_tokens, list(_response_grammars(request)))
    shared = replace(
        shared,
        return_logprob=wants_logprobs,
        top_logprobs=request.logprobs or 0,
        logprob_start=0 if wants_logprobs and request.echo else -1,
        echo=request.echo,
    )
    generations = tuple(replace(shared, prompt=prompt) for prompt in request.prompt)
    return _call(request, generations, served, "max_tokens")


def parse_chat(body: bytes, served: Served) -> Call:
    """What a body of ``/v1/chat/completions`` asks for, its messages rendered. Raises ApiError."""
    request = validated(ChatRequest, read_json(body, served.limits), served)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs: true.", param="top_logprobs")
    if len({request.max_tokens, request.max_completion_tokens} - {None}) > 1:
        message = "max_tokens and max_completion_tokens differ; send max_completion_tokens alone."
        raise ApiError(message, param="max_tokens")
    use, forced = _tools(request, served)
    generation = replace(
        _generation(
            request, request.max_completion_tokens or request.max_tokens, [*_response_grammars(request), *forced]
        ),
        prompt=_rendered(request, use, served),
        add_special_tokens=False,
        return_logprob=request.logprobs,
        top_logprobs=request.top_logprobs or 0,
    )
    call = _call(request, (generation,), served, "max_completion_tokens")
    return replace(call, tools=use, prompt_name="messages")


def validated(model: type[Model], data: Mapping[str, Any], served: Served) -> Model:
    """``data`` as ``model``, with nothing in it that we cannot honour. Raises ApiError."""
    for name, remedy in UNSUPPORTED.items():
        if data.get(name) and name not in model.model_fields:
            raise ApiError(f"{name} is not supported; {remedy}.", param=name)
    try:
        return model.model_validate(data, context=served)
    except ValidationError as error:
        raise of_validation(error) from None


def one_grammar(grammars: list[GrammarSpec]) -> GrammarSpec | None:
    """The grammar, if there is one. Raises ApiError for several."""
    if len(grammars) > 1:
        message = "Only one of response_format, json_schema, regex, ebnf and a forced tool_choice can be given."
        raise ApiError(message, param="response_format")
    return grammars[0] if grammars else None


def _response_grammars(request: OpenAIFields) -> list[GrammarSpec]:
    asked = request.response_format
    if asked is None or asked.type == "text":
        return request.grammars()
    if asked.type == "json_object":
        return [*request.grammars(), GrammarSpec("json_object")]
    if asked.json_schema is None:
        message = "response_format.json_schema is required beside type json_schema."
        raise ApiError(message, param="response_format.json_schema")
    return [*request.grammars(), GrammarSpec("json_schema", asked.json_schema.schema_)]


def _generation(request: OpenAIFields, max_new_tokens: int | None, grammars: list[GrammarSpec]) -> Generation:
    """All but prompt and log-probabilities."""
    if max_new_tokens is not None and request.min_tokens > max_new_tokens:
        raise ApiError("min_tokens must be at most max_tokens.", param="min_tokens")
    generation = Generation(
        prompt="",
        add_special_tokens=True,
        sampling=request.sampling(request.seed, request.min_tokens),
        max_new_tokens=max_new_tokens,
        text=TextOptions(
            stop=request.stop,
            include_stop=request.no_stop_trim or request.include_stop_str_in_output,
            skip_special_tokens=request.skip_special_tokens,
            spaces_between_special_tokens=request.spaces_between_special_tokens,
        ),
        n=request.n,
        ignore_eos=request.ignore_eos,
        grammar=one_grammar(grammars),
        priority=request.priority,
        extra_key=cache_key(request.cache_salt, request.extra_key),
    )
    check_grammar(generation)
    return generation


def cache_key(salt: str, extra: str) -> str:
    """Both in one, so that no two pairs share a key: neither has control characters."""
    return f"{salt}\n{extra}" if salt else extra


def _call(request: OpenAIFields, generations: tuple[Generation, ...], served: Served, tokens_name: str) -> Call:
    model = request.model or served.names[0]
    if model not in served.names:
        raise unknown_model(served.names)
    check_amount(generations, served, tokens_name)
    return Call(
        model=model,
        generations=generations,
        stream=request.stream,
        include_usage=request.stream_options.include_usage,
        continuous_usage=request.stream_options.continuous_usage_stats,
        cached_details=request.return_cached_tokens_details,
        token_ids=request.return_token_ids,
        rids=(request.rid,) if request.rid and len(generations) == 1 else (),
    )


def _tools(request: ChatRequest, served: Served) -> tuple[ToolUse | None, list[GrammarSpec]]:
    """How calls are found, and the grammar that forces them."""
    tools = request.tools or []
    choice = request.tool_choice or ("auto" if tools else "none")
    if choice == "none":
        return None, []
    if not tools:
        raise ApiError("tool_choice needs tools.", param="tool_choice")
    if len(json.dumps([tool.rendered() for tool in tools]).encode()) > served.limits.tools_bytes:
        raise ApiError(f"tools are too long; at most {served.limits.tools_bytes} bytes are allowed.", param="tools")
    names = tuple(tool.function.name for tool in tools)
    if choice.startswith("function:"):
        names = tuple(name for name in names if name == choice.removeprefix("function:"))
        if not names:
            raise ApiError("tool_choice names a function that is not among tools.", param="tool_choice")
    calls_max = 1 if choice.startswith("function:") or not request.parallel_tool_calls else served.limits.tools
    if choice == "auto":
        form = served.template.tool_form if served.template is not None else None
        return (None if form is None else ToolUse(names, form, calls_max)), []
    functions = [
        {"name": tool.function.name, "parameters": tool.function.parameters or {"type": "object"}}
        for tool in tools
        if tool.function.name in names
    ]
    schema = forced_schema(functions, calls_max)
    if len(schema.encode()) > served.limits.grammar_bytes:
        message = f"tools make a grammar that is too long; at most {served.limits.grammar_bytes} bytes are allowed."
        raise ApiError(message, param="tools")
    return ToolUse(names, "forced", calls_max), [GrammarSpec("json_schema", schema)]


def _rendered(request: ChatRequest, use: ToolUse | None, served: Served) -> str:
    template = served.template
    if template is None:
        raise ApiError(
            "This model has no chat template; use /v1/completions.", param="messages", code="no_chat_template"
        )
    tools = [tool.rendered() for tool in request.tools or []] if request.tool_choice != "none" else []
    if tools and use is None and not template.takes_tools:
        raise ApiError(
            "tools have no place in this model's chat template; leave them out or force one by tool_choice.",
            param="tools",
        )
    for index, message in enumerate(request.messages):
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise ApiError(f"messages[{index}].content is required.", param=f"messages[{index}].content")
    return template.render(
        [message.rendered() for message in request.messages],
        tools=tools,
        options=request.chat_template_kwargs,
        chars_max=served.limits.prompt_chars,
    )


def _arguments(text: str) -> Any:
    """Templates write arguments as JSON themselves; what is none stays the text that it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text
