"""From a YAML file (or a dict) to a checked ``Scenario``: every error at once, each with its place and its remedy."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from testbed.scenario.checks import Problem, find_problems
from testbed.scenario.describe import allowed, did_you_mean, field_key, field_type, is_kind, literals, models_at
from testbed.scenario.engines import with_preset
from testbed.scenario.errors import InputError, InputErrors, raise_all
from testbed.scenario.models import model_presets
from testbed.scenario.schema import Scenario
from testbed.scenario.yaml_reader import Document, FieldPath, dotted, parse_yaml, read_yaml, to_yaml

_VARIANT_NAME = re.compile(r"\w[\w .+-]*")
_PLUGIN_FILE = re.compile(r"(?P<file>.+\.py):\w+")
_PATH_FIELDS: tuple[FieldPath, ...] = (
    ("model",),
    ("device",),
    ("host",),
    ("host_inject",),
    ("cost_model",),
    ("engine", "loop"),
    ("engine", "batching"),
    ("engine", "policy"),
    ("routing", "policy"),
)
_WORKLOAD_PATH_FIELDS = ("trace", "file")


@dataclass(frozen=True, slots=True)
class LoadedScenario:
    """A scenario as read: the scenario itself, the variants that its ``compare`` names, and where all was written."""

    scenario: Scenario
    variants: dict[str, Scenario]
    """By name, in the order of the file; empty without ``compare``."""
    warnings: tuple[str, ...]
    """What runs, but probably not as meant; each with its place."""
    document: Document = field(repr=False)
    variant_documents: dict[str, Document] = field(repr=False)

    def located(self, error: InputError, variant: str = "") -> InputError:
        """``error`` with file, line and column in place of a bare field path; unchanged when it has a place.

        ``variant``: whose fields are meant; '' for the scenario itself.
        """
        return _located(error, self.variant_documents.get(variant, self.document))


def load_scenario(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> LoadedScenario:
    """Read and check a scenario. ``overrides`` are ``path.to.field=value``, the value in YAML.

    File names in it that exist beside the scenario's file are read from there. Raises InputError (InputErrors for
    several) when anything is wrong.
    """
    if isinstance(source, Mapping):
        document = Document("", _plain(source))
        folder = Path()
    else:
        document = read_yaml(source)
        folder = Path(source).parent
    if document.data is None:
        raise InputError("the scenario is empty", where=document.name, remedy="give at least model: and workload:")
    if not isinstance(document.data, dict):
        message = f"a scenario is a mapping of fields, not {_kind(document.data)}"
        raise InputError(message, where=document.where(()), remedy="begin with 'model: llama-3.1-8b'")
    if not isinstance(source, Mapping):
        document.data.setdefault("name", Path(source).stem)
    for text in overrides:
        _override(document, text)
    scenario, warnings = _build(document, folder)
    variants: dict[str, Scenario] = {}
    documents = dict(_variants(document, scenario))
    for name, variant in documents.items():
        variants[name], more = _build(variant, folder)
        warnings += [warning for warning in more if warning not in warnings]
    return LoadedScenario(scenario, variants, tuple(warnings), document, documents)


def resolve(scenario: Scenario) -> dict[str, Any]:
    """Every field with its value, as plain data: loading it gives an equal scenario."""
    resolved: dict[str, Any] = scenario.model_dump(mode="json")
    return resolved


def resolved_yaml(scenario: Scenario) -> str:
    """The text of ``scenario.resolved.yaml``."""
    return to_yaml(resolve(scenario))


def _override(document: Document, text: str) -> None:
    place = f"--set {text}"
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        remedy = "write --set path.to.field=value, for example --set engine.loop=normal"
        raise InputError("is not of the form field=value", where=place, remedy=remedy)
    try:
        parsed = parse_yaml(value, place).data
    except InputError as error:
        raise InputError(error.message, where=place, remedy=error.remedy) from None
    document.set(keys, parsed, place)


def _variants(document: Document, scenario: Scenario) -> Iterator[tuple[str, Document]]:
    """The documents of the variants: the base, with the fields that each variant names replaced."""
    compare: FieldPath = ("compare",)
    if scenario.compare is None:
        return
    if not scenario.compare:
        raise InputError(
            "compare: names no variants",
            where=document.where(compare),
            remedy="write compare: {normal: {engine.loop: normal}, overlap: {engine.loop: overlap}}",
        )
    for name, changes in scenario.compare.items():
        where = document.where((*compare, name))
        if not _VARIANT_NAME.fullmatch(name):
            remedy = "letters, digits, space, '_', '.', '+' and '-': the name becomes a folder"
            raise InputError(f"compare: {name!r} cannot name a variant", where=where, remedy=remedy)
        variant = document.copy()
        del variant.data["compare"]
        for path, value in changes.items():
            place = document.where((*compare, name, path))
            if path.split(".")[0] in ("compare", "sweep"):
                raise InputError(f"compare.{name}: {path} cannot vary", where=place, remedy="vary another field")
            variant.set(path.split("."), value, place)
        variant.data["name"] = name
        yield name, variant


def _build(document: Document, folder: Path) -> tuple[Scenario, list[str]]:
    """Validate one document; raises InputError for everything that is wrong with it."""
    data = _beside(document.data, folder)
    if "sweep" in data:
        remedy = "name the variants under compare: instead"
        raise InputError("sweep: is not available in this version", where=document.where(("sweep",)), remedy=remedy)
    raise_all([_problem(problem, document) for problem in _not_finite(data, ())])
    if isinstance(data.get("engine", {}), dict):
        data["engine"] = with_preset(data.get("engine", {}), data.get("device", "h100-sxm"))
    try:
        # JSON's strict mode: a list may become a tuple, but a quoted number is no number and true is not 1.
        scenario = Scenario.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        found = [_problem(problem, document) for problem in _schema_problems(error, data)]
        raise_all(sorted(found, key=lambda one: document.order(one.where)))
        raise
    problems, warnings = find_problems(scenario, data)
    raise_all([_problem(problem, document) for problem in problems])
    return scenario, [str(_problem(warning, document)) for warning in warnings]


def _problem(problem: Problem, document: Document) -> InputError:
    message = f"{dotted(problem.path)}: {problem.message}" if problem.path else problem.message
    return InputError(message, where=document.where(problem.path), remedy=problem.remedy)


def _located(error: InputError, document: Document) -> InputError:
    if len(error.errors) > 1:
        return InputErrors([_located(one, document) for one in error.errors])
    path: FieldPath = tuple(error.where.split("."))
    named = dotted(path)
    if field_type(Scenario, path) is None:
        path = next(_paths_of(error.where, document.data, ()), ())
        named = f"{dotted(path)}: {error.where}"
    place = document.where(path)
    if not error.where or not path or not place:
        return error
    return InputError(f"{named}: {error.message}", where=place, remedy=error.remedy)


def _paths_of(value: str, data: Any, path: FieldPath) -> Iterator[FieldPath]:
    """Where ``value`` was written: a name, or the file that ``value`` is the whole path of."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, child in inner:
        if isinstance(child, str) and child and (value == child or value.endswith(f"/{child}")):
            yield (*path, key)
        yield from _paths_of(value, child, (*path, key))


def _schema_problems(error: ValidationError, data: dict[str, Any]) -> list[Problem]:
    """pydantic's errors, one a field: the branches of a union that failed are one error to whoever wrote the field."""
    problems: dict[FieldPath, Problem] = {}
    for detail in error.errors(include_url=False):
        missing = detail["type"] == "missing"
        path, value = _written_path(detail["loc"], data, missing)
        if path not in problems and not any(path == known[: len(path)] for known in problems):
            problems[path] = _schema_problem(detail, path, value, data)
    outer = {path[:end] for path in problems for end in range(len(path))}
    return [problem for path, problem in problems.items() if path not in outer]


def _written_path(loc: tuple[str | int, ...], data: Any, missing: bool) -> tuple[FieldPath, Any]:
    """The part of pydantic's location that stands in the data (it also names union branches), and the value there."""
    path: list[str | int] = []
    for position, part in enumerate(loc):
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_list or (isinstance(data, dict) and part in data):
            data = data[part]
            path.append(part)
        elif missing and position == len(loc) - 1:
            path.append(part)
            data = None
    return tuple(path), data


def _schema_problem(detail: Mapping[str, Any], path: FieldPath, value: Any, data: dict[str, Any]) -> Problem:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        fields = _fields_beside(path, data)
        hint = did_you_mean(path[-1], fields)
        return Problem(path, "unknown field", f"{hint} fields here: {', '.join(fields)}".strip())
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = context.get("expected_tags") or _tags(path)
        shown = f"{context['tag']!r} is no known kind" if "tag" in context else "says no kind"
        hint = did_you_mean(context.get("tag", ""), re.findall(r"[\w.-]+", tags))
        inner = (*path, "kind") if isinstance(value, dict) and "kind" in value else path
        return Problem(inner, shown, f"{hint} allowed: {tags}".strip())
    place = field_type(Scenario, path)
    words = allowed(*place) if place else str(detail["msg"])
    if kind == "missing" and path == ("model",):
        words = f"a preset ({', '.join(model_presets())}) or a path to a config.json"
    if kind == "missing" and path == ("workload",):
        words += "; see docs/workloads.md"
    if kind == "missing":
        return Problem(path, "is required", f"add it: {words}")
    if kind == "value_error":
        return Problem(path, str(context["error"]), "see docs/scenario.md for the fields that go together")
    if detail["loc"][-1] == "[key]":
        key = field_key(Scenario, path[:-1])
        return Problem(path, f"{detail['input']!r} cannot be a name here", f"allowed: {key}")
    hint = did_you_mean(value, literals(place[0])) if place and isinstance(value, str) else ""
    return Problem(path, f"{_shown(value)} is not allowed here", f"{hint} allowed: {words}".strip())


def _fields_beside(path: FieldPath, data: dict[str, Any]) -> list[str]:
    """The fields that may stand where ``path`` ends, of the kind that was chosen there."""
    chosen: Any = data
    for part in path[:-1]:
        chosen = chosen[part]
    names: dict[str, None] = {}
    for model in models_at(Scenario, path[:-1]):
        kinds = literals(model.model_fields["kind"].annotation) if is_kind(model) else []
        if not kinds or not isinstance(chosen, dict) or chosen.get("kind", kinds[0]) in kinds:
            names |= dict.fromkeys(model.model_fields)
    return list(names)


def _tags(path: FieldPath) -> str:
    return ", ".join(
        tag
        for model in models_at(Scenario, path)
        if is_kind(model)
        for tag in literals(model.model_fields["kind"].annotation)
    )


def _beside(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy in which file names that exist beside the scenario's file lead there; all other names stay."""

    def lead(value: Any, found: re.Match[str] | None = None) -> Any:
        if not isinstance(value, str) or not value:
            return value
        name = found["file"] if (found := _PLUGIN_FILE.fullmatch(value)) else value
        beside = folder / name
        try:
            return value if "\0" in name or not beside.exists() else str(beside) + value[len(name) :]
        except OSError:  # a name too long for the file system is no file
            return value

    def walk(value: Any, inside: bool) -> Any:
        if isinstance(value, dict):
            return {key: walk(child, key in _WORKLOAD_PATH_FIELDS) for key, child in value.items()}
        if isinstance(value, list):
            return [walk(child, False) for child in value]
        return lead(value) if inside else value

    result: dict[str, Any] = {key: walk(value, False) if key == "workload" else value for key, value in data.items()}
    for *parents, name in _PATH_FIELDS:
        if not parents and name in result:
            result[str(name)] = lead(result[str(name)])
        elif parents and isinstance(result.get("engine"), dict) and name in result["engine"]:
            result["engine"] = {**result["engine"], name: lead(result["engine"][name])}
    return result


def _plain(value: Any) -> Any:
    """A deep copy of caller's data as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise InputError(f"{value!r} is not plain data", where="scenario", remedy="use dict, list, str, int, float, bool")


def _not_finite(value: Any, path: FieldPath) -> Iterator[Problem]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _not_finite(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _not_finite(child, (*path, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(path, f"{value} is not a finite number", "write a finite number")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    kinds = {dict: "a mapping", list: "a list", str: "text", bool: "true or false"}
    return kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)) or value is None:
        return _kind(value)
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
