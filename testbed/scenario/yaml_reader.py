"""YAML with places: plain Python data, and for every path in it the ``file:line:column`` where it was written."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from testbed.scenario.errors import InputError

FieldPath = tuple[str | int, ...]
"""Keys and list positions from the root to a value."""

_NODES_MAX = 100_000
"""Aliases can make a small file unfold into billions of values; no scenario comes near this many."""
_BYTES_MAX = 16 << 20
"""A scenario is a page; a file beyond this is a trace or a checkpoint that was named by mistake."""


def dotted(path: FieldPath) -> str:
    """``engine.rules.reserve`` for a path; keys that hold dots themselves are quoted."""
    return ".".join(f"'{part}'" if isinstance(part, str) and "." in part else str(part) for part in path)


@dataclass(slots=True)
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and where each part of it came from."""

    name: str
    data: Any
    places: dict[FieldPath, str] = field(default_factory=dict)

    def where(self, path: FieldPath) -> str:
        """The place of ``path``, or of the nearest part around it that was written; '' when nothing was."""
        for end in range(len(path), -1, -1):
            if place := self.places.get(path[:end]):
                return place
        return self.name

    def order(self, place: str) -> int:
        """The rank of a place in the file, to report errors from top to bottom."""
        places = list(self.places.values())
        return places.index(place) if place in places else -1

    def copy(self) -> Document:
        """A copy that can be changed on its own."""
        return Document(self.name, deepcopy(self.data), dict(self.places))

    def set(self, path: Sequence[str], value: Any, place: str) -> None:
        """Write ``value`` at ``path``; raises InputError when a part on the way is no mapping."""
        node = self.data
        for depth, key in enumerate(path[:-1]):
            child = node.get(key)
            if child is None:
                child = node[key] = {}
            if not isinstance(child, dict):
                here = dotted(tuple(path[: depth + 1]))
                raise InputError(
                    f"{dotted(tuple(path))}: {here} is {child!r}, which has no fields",
                    where=place,
                    remedy=f"set {here} itself, as a mapping: {here}={{...}}",
                )
            node = child
        node[path[-1]] = value
        prefix = tuple(path)
        self.places = {known: at for known, at in self.places.items() if known[: len(prefix)] != prefix}
        self.places[prefix] = place


def read_yaml(path: str | os.PathLike[str]) -> Document:
    """Read a YAML file; raises InputError with file, line and column for whatever cannot be read."""
    return parse_yaml(read_text(path, "a scenario is a YAML file"), os.fspath(path))


def read_text(path: str | os.PathLike[str], expected: str) -> str:
    """The text of a small UTF-8 file; raises InputError (``expected`` says what it should have been)."""
    name = os.fspath(path)
    try:
        if Path(path).is_dir():
            raise InputError("is a folder, not a file", where=name, remedy=f"name a file inside it: {expected}")
        if Path(path).stat().st_size > _BYTES_MAX:
            raise InputError(
                f"is larger than {_BYTES_MAX >> 20} MiB", where=name, remedy=f"name another file: {expected}"
            )
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError("no such file", where=name, remedy=_similar_files(Path(path))) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot be read: {reason}", where=name, remedy=f"name a file that can be read: {expected}"
        ) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise InputError(
            f"byte 0x{raw[error.start]:02x} is not UTF-8 text",
            where=f"{name}:{line}:{column}",
            remedy=f"save the file as UTF-8, or name another file: {expected}",
        ) from None


def parse_yaml(text: str, name: str) -> Document:
    """Parse one YAML document called ``name``; raises InputError for syntax errors, duplicate keys and NaN."""
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        reason = " ".join(str(error.problem or error.context or "cannot be parsed").split())
        raise InputError(f"YAML syntax: {reason}", where=where, remedy=_yaml_remedy(reason)) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise InputError(
            "YAML syntax: a control character", where=f"{name}:{line}:{column}", remedy="is this a binary file?"
        ) from None
    except (YAMLError, RecursionError) as error:
        raise InputError(
            f"YAML syntax: {type(error).__name__}", where=name, remedy="simplify the nesting of the file"
        ) from None
    document = Document(name, None)
    if root is not None:
        document.data = _Builder(yaml, document).build(root, ())
    return document


class _Builder:
    """Turns YAML nodes into plain data and notes where each began."""

    def __init__(self, yaml: YAML, document: Document) -> None:
        self._yaml = yaml
        self._document = document
        self._open: list[Node] = []
        self._nodes = 0

    def build(self, node: Node, path: FieldPath, begin: Node | None = None) -> Any:
        """The value of ``node``; ``begin`` is its key, where there is one: the place a reader looks for."""
        mark = (begin or node).start_mark
        place = f"{self._document.name}:{mark.line + 1}:{mark.column + 1}"
        self._document.places[path] = place
        self._nodes += 1
        if self._nodes > _NODES_MAX or any(node is parent for parent in self._open):
            raise InputError("aliases unfold without end", where=place, remedy="write the values out, without aliases")
        if isinstance(node, ScalarNode):
            return self._scalar(node, path, place)
        self._open.append(node)
        try:
            if isinstance(node, SequenceNode):
                return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
            assert isinstance(node, MappingNode)
            return self._mapping(node, path)
        finally:
            self._open.pop()

    def _mapping(self, node: MappingNode, path: FieldPath) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        lines: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            mark = key_node.start_mark
            place = f"{self._document.name}:{mark.line + 1}:{mark.column + 1}"
            key = key_node.value if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str) or key == "<<":
                shown = "a merge (<<)" if key == "<<" else "a list or a mapping"
                raise InputError(
                    f"{shown} cannot be a field name", where=place, remedy="write field names as plain text"
                )
            if key in lines:
                raise InputError(
                    f"{dotted((*path, key))}: given twice, first in line {lines[key]}",
                    where=place,
                    remedy="keep one of the two",
                )
            lines[key] = mark.line + 1
            result[key] = self.build(value_node, (*path, key), key_node)
        return result

    def _scalar(self, node: ScalarNode, path: FieldPath, place: str) -> Any:
        try:
            value = self._yaml.constructor.construct_object(node, deep=True)
        except (YAMLError, ValueError, TypeError, OverflowError):
            value = None if node.value == "" else node.value
        if isinstance(value, float) and not math.isfinite(value):
            named = f"{dotted(path)}: " if path else ""  # nameless: the value of a --set
            message = f"{named}{node.value} is not a finite number"
            raise InputError(message, where=place, remedy="write a finite number")
        if isinstance(value, float) and value.is_integer() and "." not in node.value:
            return int(value)  # 60e6 is a whole number to whoever writes it
        return value if value is None or isinstance(value, (str, bool, int, float)) else str(node.value)


def _yaml_remedy(reason: str) -> str:
    if "\\t" in reason or "tab" in reason:
        return "indent with spaces, not tabs"
    if "document" in reason:
        return "keep one document a file: remove the line '---'"
    return "check indentation, quotes and brackets at this place"


def _similar_files(path: Path) -> str:
    """A hint at what may have been meant by a path that does not exist."""
    import difflib

    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = sorted(child.name for child in folder.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3)
    return f"did you mean {' or '.join(str(folder / name) for name in close)}?" if close else "check the path"


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML text, keys in the given order."""
    from io import StringIO

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 120
    text = StringIO()
    yaml.dump(dict(data), text)
    return text.getvalue()
