"""Errors as OpenAI's API tells them: ``{"error": {"message", "type", "param", "code"}}``.

Messages are made here and in the parsers, from a closed set of words: no text of an exception, no path, and of what a
client sent only names that are in the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
"""By status. Other statuses from 400 on are ``invalid_request_error``, from 500 on ``server_error``."""


class ApiError(Exception):
    """A request that is refused: ``message`` names the field and the remedy; ``status`` is HTTP's."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error."""
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def content(self) -> dict[str, object]:
        """The error object, as in the body of a reply and in an event of a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The reply's body, JSON."""
        return msgspec.json.encode(self.content())

    def headers(self) -> dict[str, str]:
        """The reply's headers beside its body."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def too_large(body_bytes: int) -> ApiError:
    """The body is longer than this many bytes."""
    return ApiError(f"The body is too large; send at most {body_bytes} bytes.", status=413, code="body_too_large")


def unknown_model(names: Sequence[str]) -> ApiError:
    """The model is not one of ``names``."""
    served = ", ".join(names)
    message = f"model does not exist here; this server has {served}."
    return ApiError(message, status=404, param="model", code="model_not_found")


def no_route() -> ApiError:
    """Nothing is at this address."""
    return ApiError("No such address; /openapi.json lists what there is.", status=404, code="not_found")


def not_supported(what: str) -> ApiError:
    """An address of the protocol that this server does not have yet."""
    return ApiError(f"{what} is not supported by this server.", status=404, code="not_supported")


def wrong_key() -> ApiError:
    """No API key, or not the right one."""
    message = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
    return ApiError(message, status=401, code="invalid_api_key")


def overloaded(retry_after_s: int) -> ApiError:
    """The queue is full."""
    message = f"The server is at its limit of waiting requests; try again in {retry_after_s} s."
    return ApiError(message, status=503, code="overloaded", retry_after_s=retry_after_s)


def internal() -> ApiError:
    """Whatever else went wrong; the reason is in the server's log, not in the reply."""
    return ApiError("The server failed to answer this request; its log says why.", status=500, code="internal_error")


def of_end(status: int, message: str, retry_after_s: int) -> ApiError:
    """The error for a request that ended with ``status`` and ``message`` of the scheduler's."""
    if status == 503:
        return overloaded(retry_after_s)
    if 400 <= status < 500:
        return ApiError(message[:1].upper() + message[1:] + ".", status=status)
    return internal()


def words(text: str) -> PydanticCustomError:
    """An error of a validator: ``text`` follows the field's name."""
    return PydanticCustomError("words", "{text}", {"text": text})


KINDS = {
    "missing": "is required",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_pattern_mismatch": "has characters that are not allowed here",
    "words": "{text}",
}
"""Pydantic's kinds of error in our words."""


def of_validation(error: ValidationError) -> ApiError:
    """The first of the errors, named after its field."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = _param(first)
    text = KINDS.get(first["type"], "is not valid").format(**_plain(first.get("ctx", {})))
    return ApiError(f"{param or 'The body'} {text}.", param=param or None)


def _plain(context: dict[str, object]) -> dict[str, object]:
    return {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}


def _param(error: ErrorDetails) -> str:
    path = ""
    for part in error["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
