"""The kinds of field that requests are made of. Each knows its bounds; those that can be set are names in ``Limits``,
read when a body is checked, and written into the published schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import core_schema

from testbed.server.protocol.body import read_json
from testbed.server.protocol.errors import ApiError, words
from testbed.server.protocol.generation import Served

INT32_MAX = 2**31 - 1
_LENGTHS = {"string": "maxLength", "array": "maxItems", "object": "maxProperties"}


class Fields(BaseModel):
    """An object of a request. Types are taken as they are (true is no integer, "1" no number), null is the same as
    absent, and fields that we do not know are ignored, as clients of other servers send them."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        made = handler(schema)
        whole = handler.resolve_ref_schema(made)
        for name, field in whole.get("properties", {}).items():
            if name not in whole.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                whole["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        return made


@dataclass(frozen=True)
class AtMost:
    """The upper bound of a number, or of the length of a string, list or object: a name in ``Limits``."""

    limit: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Pydantic's hook: checked behind the type itself."""
        return core_schema.with_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Pydantic's hook: the bound's name, for ``published`` to replace."""
        made = handler(schema)
        made[_LENGTHS.get(made.get("type", ""), "maximum")] = f"limits.{self.limit}"
        return made

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        most = getattr(limits_of(info), self.limit)
        if isinstance(value, int):
            if value > most:
                raise words(f"must be at most {most}")
        elif len(value) > most:
            unit = "characters" if isinstance(value, str) else "entries"
            raise words(f"has too many {unit}; at most {most} are allowed")
        return value


@dataclass(frozen=True)
class OneOrMany:
    """A list that may be sent as its only element."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Pydantic's hook: always a list from here on."""
        return core_schema.no_info_before_validator_function(
            lambda value: value if isinstance(value, list) else [value], handler(source)
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Pydantic's hook: both forms."""
        made = handler(schema)
        return {"anyOf": [made["items"], made]}


def limits_of(info: ValidationInfo) -> Any:
    """The limits that a body is checked against."""
    return served_of(info).limits


def served_of(info: ValidationInfo) -> Served:
    """What a body is checked against."""
    served = info.context
    assert isinstance(served, Served)
    return served


def published(model: type[Fields], served: Served) -> dict[str, Any]:
    """The JSON schema of ``model`` with the bounds in force, for the OpenAPI page."""
    schema: dict[str, Any] = _with_bounds(model.model_json_schema(), served)
    return schema


def _with_bounds(node: Any, served: Served) -> Any:
    if isinstance(node, dict):
        return {name: _with_bounds(value, served) for name, value in node.items()}
    if isinstance(node, list):
        return [_with_bounds(value, served) for value in node]
    if node == "last token":
        return served.vocab_size - 1
    if isinstance(node, str) and node.startswith("limits."):
        return getattr(served.limits, node.removeprefix("limits."))
    return node


def _token_ids(value: Any, served: Served, what: str = "") -> list[int]:
    if not all(type(token) is int for token in value):
        raise words(f"{what}must hold integers only")
    if value and not (min(value) >= 0 and max(value) < served.vocab_size):
        raise words(f"{what}has ids outside the vocabulary; they must lie between 0 and {served.vocab_size - 1}")
    return list(value)


def _prompt(value: Any, served: Served, what: str = "") -> str | NDArray[np.int32]:
    limits = served.limits
    if isinstance(value, str):
        if len(value) > limits.prompt_chars:
            raise words(f"{what}is too long; at most {limits.prompt_chars} characters are allowed")
        if not value:
            raise words(f"{what}is empty; send at least one character")
        return value
    if not isinstance(value, list):
        raise words(f"{what}must be a string or a list of token ids")
    if not value:
        raise words(f"{what}is empty; send at least one token id")
    if len(value) > limits.prompt_tokens:
        raise words(f"{what}is too long; at most {limits.prompt_tokens} token ids are allowed")
    return np.array(_token_ids(value, served, what), np.int32)


def _prompts(value: Any, info: ValidationInfo) -> list[str | NDArray[np.int32]]:
    served = served_of(info)
    if not (isinstance(value, list) and value and isinstance(value[0], str | list)):
        return [_prompt(value, served)]
    if len(value) > served.limits.prompts:
        raise words(f"has too many prompts; at most {served.limits.prompts} are allowed")
    return [_prompt(part, served, f"element {index} ") for index, part in enumerate(value)]


def _stop_strings(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    limits = limits_of(info)
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise words("must be a string or a list of strings")
    if len(stops) > limits.stops:
        raise words(f"has too many strings; at most {limits.stops} are allowed")
    if not all(1 <= len(stop) <= limits.stop_chars for stop in stops):
        raise words(f"must hold strings of 1 to {limits.stop_chars} characters")
    return tuple(stops)


def _stop_ids(value: Any, info: ValidationInfo) -> tuple[int, ...]:
    served = served_of(info)
    if not isinstance(value, list):
        raise words("must be a list of token ids")
    if len(value) > served.limits.stop_token_ids:
        raise words(f"has too many ids; at most {served.limits.stop_token_ids} are allowed")
    return tuple(_token_ids(value, served))


def _biases(value: Any, info: ValidationInfo) -> tuple[tuple[int, float], ...]:
    served = served_of(info)
    if not isinstance(value, dict):
        raise words("must be an object of token ids and numbers")
    if len(value) > served.limits.logit_bias:
        raise words(f"has too many entries; at most {served.limits.logit_bias} are allowed")
    for name, bias in value.items():
        if not (name.isascii() and name.isdigit() and len(name) < 12 and str(int(name)) == name):
            raise words("must have token ids as names, in decimal digits")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise words("must have numbers between -100 and 100 as values")
    _token_ids([int(name) for name in value], served)
    return tuple((int(name), float(bias)) for name, bias in value.items())


def _grammar(value: Any, info: ValidationInfo) -> str:
    most = limits_of(info).grammar_bytes
    if not isinstance(value, str):
        raise words("must be a string")
    if not value:
        raise words("must not be empty")
    if len(value.encode()) > most:
        raise words(f"is too long; at most {most} bytes are allowed")
    return value


def _schema(value: Any, info: ValidationInfo) -> str:
    """A JSON schema given as an object, or as its text."""
    if isinstance(value, str):
        try:
            value = read_json(_grammar(value, info).encode(), limits_of(info))
        except ApiError:
            raise words("must be a JSON schema (an object), or the text of one") from None
    if not isinstance(value, dict):
        raise words("must be a JSON schema: an object")
    return _grammar(json.dumps(value, ensure_ascii=False), info)


def _content(value: Any, info: ValidationInfo) -> str:
    """A message's text, from a string or from a list of text parts (joined as they are)."""
    most = limits_of(info).messages
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise words("must be a string or a list of parts")
    if len(value) > most:
        raise words(f"has too many parts; at most {most} are allowed")
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in MEDIA:
            raise words(f"has a part of type {kind}; this server takes parts of type text only")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise words(f'has part {index} in another form than {{"type": "text", "text": "..."}}')
    return "".join(part["text"] for part in value)


MEDIA = ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "refusal")


def _options(value: Any, info: ValidationInfo) -> dict[str, Any]:
    limits = limits_of(info)
    if not isinstance(value, Mapping) or len(value) > limits.template_options:
        raise words(f"must be an object of at most {limits.template_options} entries")
    for name, option in value.items():
        if not (name.isidentifier() and len(name) <= 64) or name in RESERVED:
            raise words("has a name that a chat template's option cannot have")
        if not isinstance(option, str | int | float) or (isinstance(option, str) and len(option) > limits.name_chars):
            raise words("must have true, false, numbers or short strings as values")
    return dict(value)


RESERVED = ("messages", "tools", "add_generation_prompt", "documents", "turns", "raise_exception", "strftime_now")
"""What a chat template is given by us."""

_IDS = {"type": "array", "maxItems": "limits.prompt_tokens", "minItems": 1}
_ID = {"type": "integer", "minimum": 0, "maximum": "last token"}
_TEXT = {"type": "string", "minLength": 1, "maxLength": "limits.prompt_chars"}
_MANY = {"type": "array", "minItems": 1, "maxItems": "limits.prompts"}
_STOP = {"type": "string", "minLength": 1, "maxLength": "limits.stop_chars"}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string", "maxLength": "limits.prompt_chars"}},
    "required": ["type", "text"],
}
_SCHEMA = {"type": "object", "maxProperties": "limits.grammar_bytes"}
_GRAMMAR = {"type": "string", "minLength": 1, "maxLength": "limits.grammar_bytes"}


def _one_of(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(kinds)})


Prompts = Annotated[
    list[Any],
    PlainValidator(_prompts),
    _one_of(_TEXT, {**_MANY, "items": _TEXT}, {**_IDS, "items": _ID}, {**_MANY, "items": {**_IDS, "items": _ID}}),
]
"""list of str or int32 [tokens]: one or many prompts, each as text or as token ids."""
StopStrings = Annotated[
    tuple[str, ...],
    PlainValidator(_stop_strings),
    _one_of(_STOP, {"type": "array", "maxItems": "limits.stops", "items": _STOP}),
]
StopIds = Annotated[
    tuple[int, ...],
    PlainValidator(_stop_ids),
    WithJsonSchema({"type": "array", "maxItems": "limits.stop_token_ids", "items": _ID}),
]
Biases = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": "limits.logit_bias",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,10})$", "maxLength": 11},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]
GrammarText = Annotated[str, PlainValidator(_grammar), WithJsonSchema(_GRAMMAR)]
SchemaText = Annotated[str, PlainValidator(_schema), _one_of(_SCHEMA, _GRAMMAR)]
"""A JSON schema, as its text."""
Content = Annotated[
    str,
    PlainValidator(_content),
    _one_of(
        {"type": "string", "maxLength": "limits.prompt_chars"},
        {"type": "array", "maxItems": "limits.messages", "items": _PART},
    ),
]
Options = Annotated[
    dict[str, Any],
    PlainValidator(_options),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": "limits.template_options",
            "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$", "maxLength": 64},
            "additionalProperties": {
                "anyOf": [
                    {"type": "boolean"},
                    {"type": "number", "minimum": -(2**53), "maximum": 2**53},
                    {"type": "string", "maxLength": "limits.name_chars"},
                ]
            },
        }
    ),
]
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"), AtMost("name_chars")]
"""An id or a key: no control characters, so that it can stand in a line of a log."""
Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Repetition = Annotated[float, Field(gt=0, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Priority = Annotated[int, Field(ge=-INT32_MAX, le=INT32_MAX)]
Choices = Annotated[int, Field(ge=1), AtMost("n")]
OutputTokens = Annotated[int, Field(ge=1), AtMost("max_tokens")]
NoOrMoreTokens = Annotated[int, Field(ge=0), AtMost("max_tokens")]
TopLogprobs = Annotated[int, Field(ge=0), AtMost("logprobs")]


def _top_k(value: Any) -> Any:
    if value == 0 and type(value) is int:
        raise words("must be -1 (all tokens) or at least 1")
    return value


TopK = Annotated[int, Field(ge=-1, le=INT32_MAX, json_schema_extra={"not": {"const": 0}}), BeforeValidator(_top_k)]
