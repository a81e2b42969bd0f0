"""Host profiles: what one iteration of an engine's loop costs its host thread, by stage.

A profile is a YAML file; ``hosts/`` holds the presets. Every parameter is ``[value, mark, source]``: ``measured`` was
published or measured, ``derived`` follows from such values, ``guessed`` does not. Times are microseconds there and
integer nanoseconds here. A stage costs::

    fixed + per_row * rows + per_new_token * new_tokens + per_admitted * admitted + per_waiting * waiting
          + per_matched_token * matched_tokens + per_waiting_x_admitted * waiting * admitted

with rows above ``knee_rows`` counted twice (caches overflow). A stage whose cost in a step that admits or prefills
(``process``: that ends requests, which ``admitted`` counts there) follows another line has the keys ``decode`` and
``prefill``. ``tensor_parallel`` holds what is added when tp > 1, ``threads`` what it takes to wake a second thread
(``wake_us``: from the moment that it is told to go on until it does; 0 when absent).
``fit`` says of a profile that `testbed calibrate` wrote where it was measured and how far off it is; it has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from testbed.costs.devices import number, read_mapping
from testbed.ports import Stage
from testbed.scenario.errors import InputError

_PRESETS = Path(__file__).parent / "hosts"
MARKS = ("measured", "derived", "guessed")
_TERMS = (
    "fixed",
    "per_row",
    "per_new_token",
    "per_admitted",
    "per_waiting",
    "per_matched_token",
    "per_waiting_x_admitted",
)
_LAUNCH = ("graph", "graph_per_kernel", "eager_per_kernel")


class Terms(NamedTuple):
    """Coefficients of one stage, ns."""

    fixed: float = 0.0
    per_row: float = 0.0
    per_new_token: float = 0.0
    per_admitted: float = 0.0
    per_waiting: float = 0.0
    per_matched_token: float = 0.0
    per_waiting_x_admitted: float = 0.0

    def plus(self, other: Terms) -> Terms:
        """Term by term."""
        return Terms(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True)
class Parameter:
    """One number of a profile and where it is from."""

    name: str
    value: float
    mark: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} = {self.value:g} us ({self.source})" if self.source else f"{self.name} = {self.value:g} us"


class HostProfile:
    """Prices the stages of a loop iteration, and launches, for one host."""

    def __init__(
        self,
        name: str,
        decode: dict[Stage, Terms],
        prefill: dict[Stage, Terms],
        launch: tuple[float, float, float] = (0.0, 0.0, 0.0),
        *,
        wake_ns: int = 0,
        knee_rows: float = float("inf"),
        parameters: tuple[Parameter, ...] = (),
        source: str = "",
        fit: Mapping[str, Any] | None = None,
    ) -> None:
        """``launch``: ns of a graph, of each of its kernels, and of a kernel launched alone. ``wake_ns``: of waking a
        thread. ``fit``: how well the profile fits what it was measured from, where it was."""
        self.name, self.source, self.parameters = name, source, parameters
        self.fit: Mapping[str, Any] = fit or {}
        self._decode = [decode.get(stage, Terms()) for stage in Stage]
        self._prefill = [prefill.get(stage, Terms()) for stage in Stage]
        self._launch, self._knee = launch, knee_rows
        self.wake_ns = wake_ns
        self._by_rows_only = [not any(terms[2:]) for terms in self._decode]
        self._kept: list[dict[int, int]] = [{} for _ in Stage]
        self._kept_launch: dict[tuple[int, bool], int] = {}

    def price(
        self,
        stage: Stage,
        rows: int = 0,
        new_tokens: int = 0,
        admitted: int = 0,
        waiting: int = 0,
        matched_tokens: int = 0,
    ) -> int:
        """The cost (ns) of a stage; the arguments are those of ``Cpu.charge``."""
        if not (new_tokens or admitted):
            kept = self._kept[stage]
            if rows in kept:
                return kept[rows]
            terms = self._decode[stage]
            if self._by_rows_only[stage]:
                kept[rows] = cost = self._rows_ns(terms, rows)
                return cost
        else:
            terms = self._prefill[stage]
        return self._rows_ns(terms, rows) + int(
            terms.per_new_token * new_tokens
            + terms.per_admitted * admitted
            + waiting * (terms.per_waiting + terms.per_waiting_x_admitted * admitted)
            + terms.per_matched_token * matched_tokens
        )

    def launch_ns(self, kernels: int, graph: bool) -> int:
        """The cost (ns) of launching this many kernels, as one CUDA graph or one by one."""
        key = kernels, graph
        cost = self._kept_launch.get(key)
        if cost is None:
            fixed, per_node, per_kernel = self._launch
            whole = (fixed + per_node * kernels if kernels else 0.0) if graph else per_kernel * kernels
            self._kept_launch[key] = cost = int(whole)
        return cost

    def guesses(self) -> list[str]:
        """The parameters that are guessed and not zero, with their values; for reports."""
        return [str(parameter) for parameter in self.parameters if parameter.mark == "guessed" and parameter.value]

    def _rows_ns(self, terms: Terms, rows: int) -> int:
        return int(terms.fixed + terms.per_row * (rows + max(0.0, rows - self._knee)))


def host_presets() -> list[str]:
    """Names of the presets, sorted."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def constant_host(iteration_ns: int) -> HostProfile:
    """A host that costs the same in every iteration, charged to SCHEDULE; launching is free."""
    terms = {Stage.SCHEDULE: Terms(fixed=float(iteration_ns))}
    return HostProfile("constant", terms, terms, source="constant of the scenario")


def load_host(
    name_or_path: str | Path, *, tp: int = 1, cpu_speed: float | None = None, where: str = "host"
) -> HostProfile:
    """A preset by name, or a file in the same form, for ``tp`` devices. ``where``: the field that names it.

    ``cpu_speed`` is time on the target core over time on the reference core; all times scale with it. None: the file's
    ``cpu_speed``, else the ``at_cpu_speed`` that its values are stated for. Raises InputError when there is no such
    profile, or a field is unknown, missing or not a number from 0.
    """
    name = str(name_or_path)
    preset = _PRESETS / f"{name}.yaml"
    path = preset if Path(name).name == name and preset.is_file() else Path(name).expanduser()
    if not path.is_file():
        known = host_presets()
        close = get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        message = f"no preset or file is called {name!r}"
        raise InputError(message, where=where, remedy=f"{hint}presets: {', '.join(known)}; or a profile file")
    return _profile(read_mapping(path), path, tp, cpu_speed)


_FIELDS = (
    *("name", "source", "at_cpu_speed", "cpu_speed", "knee_rows", "stages", "tensor_parallel"),
    *("launch", "threads", "fit"),
)


def _profile(data: dict[str, Any], path: Path, tp: int, cpu_speed: float | None) -> HostProfile:
    where = str(path)
    _known(data, _FIELDS, where)
    reference = number({"at_cpu_speed": 1.0} | data, "at_cpu_speed", where, 1e-3)
    speed = cpu_speed if cpu_speed is not None else number({"cpu_speed": reference} | data, "cpu_speed", where, 1e-3)
    if not speed > 0:
        raise InputError(f"cpu_speed {speed!r} is not above 0", where="cpu_speed", remedy="a number above 0")
    reader = _Reader(where, 1e3 * speed / reference)
    decode, prefill = reader.stages(data, "stages")
    if tp > 1 and "tensor_parallel" in data:
        for terms, more in zip((decode, prefill), reader.stages(data, "tensor_parallel"), strict=True):
            for stage, added in more.items():
                terms[stage] = terms.get(stage, Terms()).plus(added)
    launch = _mapping(data, "launch", where)
    _known(launch, [f"{term}_us" for term in _LAUNCH], f"{where}: launch")
    graph, per_node, per_kernel = (reader.parameter(launch, term, "launch") for term in _LAUNCH)
    threads = _mapping(data, "threads", where) if "threads" in data else {}
    _known(threads, ["wake_us"], f"{where}: threads")
    knee = number(data, "knee_rows", where, 1) if "knee_rows" in data else float("inf")
    return HostProfile(
        str(data.get("name", path.stem)),
        decode,
        prefill,
        (graph, per_node, per_kernel),
        wake_ns=int(reader.parameter(threads, "wake", "threads")),
        knee_rows=knee,
        parameters=tuple(reader.parameters),
        source=str(data.get("source", "")),
        fit=_mapping(data, "fit", where) if "fit" in data else None,
    )


class _Reader:
    """Reads parameters of one file, and keeps them in order."""

    def __init__(self, where: str, ns_per_unit: float) -> None:
        self.where, self.ns_per_unit = where, ns_per_unit
        self.parameters: list[Parameter] = []

    def stages(self, data: dict[str, Any], key: str) -> tuple[dict[Stage, Terms], dict[Stage, Terms]]:
        """Terms by stage of a decode step and of a step that admits or prefills."""
        mapping = _mapping(data, key, self.where)
        names = {stage.name.lower(): stage for stage in Stage}
        _known(mapping, names, f"{self.where}: {key}")
        decode: dict[Stage, Terms] = {}
        prefill: dict[Stage, Terms] = {}
        for name in mapping:
            place, form = f"{key}.{name}", _mapping(mapping, name, f"{self.where}: {key}")
            if form.keys() <= {"decode", "prefill"}:
                if "decode" in form:
                    decode[names[name]] = self._terms(_mapping(form, "decode", place), f"{place}.decode")
                if "prefill" in form:
                    prefill[names[name]] = self._terms(_mapping(form, "prefill", place), f"{place}.prefill")
            else:
                decode[names[name]] = prefill[names[name]] = self._terms(form, place)
        return decode, prefill

    def _terms(self, form: dict[str, Any], place: str) -> Terms:
        _known(form, [f"{term}_us" for term in _TERMS], f"{self.where}: {place}")
        return Terms(*(self.parameter(form, term, place) for term in _TERMS))

    def parameter(self, form: dict[str, Any], term: str, place: str) -> float:
        """The nanoseconds of ``term``, 0 when absent."""
        key = f"{term}_us"
        if key not in form:
            return 0.0
        entry, where = form[key], f"{self.where}: {place}.{key}"
        if not isinstance(entry, list) or len(entry) != 3 or entry[1] not in MARKS:
            remedy = f"[value, mark, source]; marks: {', '.join(MARKS)}"
            raise InputError(f"{entry!r} is not a parameter", where=where, remedy=remedy)
        value = number({key: entry[0]}, key, f"{self.where}: {place}")
        self.parameters.append(Parameter(f"{place}.{term}", value, entry[1], str(entry[2])))
        return value * self.ns_per_unit


def _mapping(data: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = data.get(key)
    if not isinstance(value, dict):
        raise InputError("the field is missing or not a mapping", where=f"{where}: {key}", remedy="see a preset")
    return value


def _known(data: dict[str, Any], allowed: Any, where: str) -> None:
    names = list(allowed)
    for unknown in sorted(str(key) for key in data if key not in names):
        close = get_close_matches(unknown, names, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"one of {', '.join(names)}"
        raise InputError("unknown field", where=f"{where}: {unknown}", remedy=remedy)
