"""What a field allows, in words: read off the schema, so that messages and documentation cannot disagree with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from testbed.scenario.yaml_reader import FieldPath

_Place = tuple[Any, tuple[Any, ...]]
"""An annotation and the constraints that stand beside it."""


def field_type(model: type[BaseModel], path: FieldPath) -> _Place | None:
    """Annotation and constraints of the field at ``path``; None when the schema has no such field."""
    place: _Place = (model, ())
    for part in path:
        for option in _flatten(*place):
            if inner := _child(option[0], part):
                place = inner
                break
        else:
            return None
    return place


def field_key(model: type[BaseModel], path: FieldPath) -> str:
    """What a name inside the mapping at ``path`` may be, in words."""
    place = field_type(model, path)
    options = _flatten(*place) if place else []
    return " | ".join(allowed(get_args(option)[0]) for option, _ in options if _origin(option) is dict)


def models_at(model: type[BaseModel], path: FieldPath) -> list[type[BaseModel]]:
    """The schema's parts that may stand at ``path``."""
    place = field_type(model, path)
    return [option for option, _ in _flatten(*place) if _is_model(option)] if place else []


def allowed(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    """What may be written, e.g. ``auto | normal | package.module:name`` or ``a whole number above 0``."""
    options = _flatten(annotation, tuple(constraints))
    kinds = [kind for option, _ in options for kind in _kinds(option)]
    words = [_words(*option) for option in options if not _kinds(option[0])]
    if kinds:
        words.append(f"{{kind: {' | '.join(kinds)}, ...}}")
    return " | ".join(dict.fromkeys(words))


def literals(annotation: Any) -> list[str]:
    """The words among what may be written."""
    return [
        value
        for option, _ in _flatten(annotation, ())
        if _origin(option) is Literal
        for value in get_args(option)
        if isinstance(value, str)
    ]


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """``did you mean 'overlap'?`` when a known word is close, else ''."""
    close = difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""


def _child(annotation: Any, part: str | int) -> _Place | None:
    if _is_model(annotation):
        info: FieldInfo | None = annotation.model_fields.get(part)
        return (info.annotation, tuple(info.metadata)) if info else None
    if _origin(annotation) is dict:
        return get_args(annotation)[1], ()
    if _origin(annotation) is tuple:
        return get_args(annotation)[0], ()
    return None


def _origin(annotation: Any) -> object:
    return get_origin(annotation)


def _kinds(annotation: Any) -> list[str]:
    """The ``kind`` words of one of several models that are told apart by it."""
    return literals(annotation.model_fields["kind"].annotation) if is_kind(annotation) else []


def is_kind(annotation: Any) -> bool:
    """Whether this is a model that a field ``kind`` tells apart from its like."""
    return _is_model(annotation) and "kind" in annotation.model_fields


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _flatten(annotation: Any, constraints: tuple[Any, ...]) -> list[_Place]:
    """The alternatives of a union, each with its own constraints; None (a field left out) is no alternative."""
    if _origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _flatten(inner, (*constraints, *more))
    if _origin(annotation) in (Union, UnionType):
        return [place for option in get_args(annotation) for place in _flatten(option, constraints)]
    return [] if annotation is NoneType else [(annotation, constraints)]


def _words(annotation: Any, constraints: tuple[Any, ...]) -> str:
    for constraint in constraints:
        if description := getattr(constraint, "description", None):
            return str(description)
    if _origin(annotation) is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if _is_model(annotation):
        return f"a mapping with {', '.join(annotation.model_fields)}"
    if _origin(annotation) is dict:
        key, value = get_args(annotation)
        names = allowed(key) if key is not str else "name"
        return f"{{{names}: {'...' if value is Any else allowed(value)}}}"
    if _origin(annotation) is tuple:
        return f"a list of: {allowed(get_args(annotation)[0])}"
    words = {int: "a whole number", float: "a number", bool: "true | false", str: "text"}.get(
        annotation, str(annotation)
    )
    return words + _limits(constraints)


def _limits(constraints: tuple[Any, ...]) -> str:
    bounds: dict[str, Any] = {}
    for constraint in constraints:
        for part in (constraint, *getattr(constraint, "metadata", ())):
            bounds |= {name: getattr(part, name) for name in ("gt", "ge", "lt", "le") if hasattr(part, name)}
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    texts = [f"{words[name]} {value:g}" for name, value in bounds.items() if value is not None]
    return f" {' and '.join(texts)}" if texts else ""
