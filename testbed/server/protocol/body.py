"""A body's JSON, read so that what two readers might take differently is refused."""

from __future__ import annotations

import json
import math
from typing import Any

from testbed.server.protocol.errors import ApiError, too_large
from testbed.server.protocol.limits import Limits


def read_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """The object in ``body`` (JSON in UTF-8, RFC 8259).

    Raises ApiError for anything else, and for what the RFC leaves open: a name twice in one object, numbers that are
    not finite, strings that are no Unicode text (lone surrogates), more than ``limits.json_depth`` levels.
    """
    if len(body) > limits.body_bytes:
        raise too_large(limits.body_bytes)
    value = _load(body)
    if not isinstance(value, dict):
        raise ApiError("The body must be a JSON object.", code="invalid_json")
    if body.count(b"[") + body.count(b"{") > limits.json_depth and _deeper(value, limits.json_depth):
        raise ApiError(f"The body is nested too deeply; {limits.json_depth} levels are allowed.", code="invalid_json")
    if b"\\u" in body:
        _check_text(value)
    return value


def _load(body: bytes) -> Any:
    try:
        return json.loads(
            body.decode("utf-8"), object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant
        )
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}, column {error.colno}"
    except ValueError:  # an integer of thousands of digits
        reason = "a number has too many digits"
    except RecursionError:
        reason = "it is nested too deeply"
    raise ApiError(f"The body is not valid JSON: {reason}.", code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ApiError("The body has an object with the same name twice; keep one of them.", code="invalid_json")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ApiError("The body has a number that is too large; numbers must be finite.", code="invalid_json")
    return number


def _no_constant(text: str) -> float:
    raise ApiError(f"The body has {text}, which is not JSON; numbers must be finite.", code="invalid_json")


def _deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        parts = (part for node in level for part in (node.values() if isinstance(node, dict) else node))
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _check_text(value: dict[str, Any]) -> None:
    for name, part in value.items():
        try:
            json.dumps([name, part], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            where = ascii(name[:40])[1:-1]
            message = f"{where} has half of a surrogate pair, which is no character; send whole characters."
            raise ApiError(message, param=where, code="invalid_json") from None
