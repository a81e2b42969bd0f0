"""A device: its peaks, its measured operator tables, and the formula for what is not measured.

The peaks of a preset are those of its datasheet; those of a profile that ``testbed calibrate`` wrote are the ceilings
that it measured.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from testbed.scenario.errors import InputError

_PRESETS = Path(__file__).parent / "devices"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Formula:
    """``max(flops / (compute_efficiency * peak), bytes / (memory_efficiency * bandwidth)) + kernel_ns``."""

    compute_efficiency: float
    memory_efficiency: float
    kernel_ns: float
    """Least time of a kernel."""
    sampling_ns: float
    """Least time of sampling one step."""
    link_efficiency: float
    all_reduce_ns: float
    """Latency of an operation over a link without a table."""


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One device. Rates are per nanosecond, so that a division gives nanoseconds."""

    name: str
    device: str
    memory_bytes: int
    bytes_per_ns: float
    """Peak memory bandwidth."""
    flops_per_ns: dict[str, float]
    """Peak by dtype, dense."""
    link_bytes_per_ns: float
    """To the other devices of the node, one direction."""
    devices_per_node: int
    formula: Formula
    decode_skew: float
    """Where between its time at the mean and at the longest context decode attention of unequal rows lies, 0 to 1;
    a table of that name goes before it."""
    source: str
    tables: dict[str, Any] = field(default_factory=dict, repr=False)
    """Operator tables as ``testbed.costs.tables`` describes them; an operator without one is priced by formula."""
    launches_per_step: int | None = None
    """Submissions of a step on a device behind a queue, whatever the step computes (a worker process takes one); such a
    device has no CUDA graphs. None: every kernel of an eager step is launched."""
    fit: dict[str, Any] = field(default_factory=dict, repr=False)
    """How well the tables fit what they were made from, as ``testbed calibrate`` found it."""
    network_bytes_per_ns: float | None = None
    """From each device to other nodes, one direction; None: the profile does not say."""

    def peak(self, dtype: str) -> float:
        """FLOP a nanosecond of ``dtype``; InputError when the device does not compute in it."""
        if dtype not in self.flops_per_ns:
            message = f"{self.device} does not compute in {dtype}"
            remedy = f"one of {', '.join(sorted(self.flops_per_ns))}"
            raise InputError(message, where="engine.quantization" if dtype == "fp8" else "engine.dtype", remedy=remedy)
        return self.flops_per_ns[dtype]

    def network(self, where: str) -> float:
        """Bytes a nanosecond to other nodes; InputError at the field ``where`` when the profile does not say."""
        if self.network_bytes_per_ns is None:
            message = f"takes more than a node of {self.devices_per_node} devices; no network of {self.name} is known"
            raise InputError(message, where=where, remedy="fewer devices, or a profile with network_gb_s")
        return self.network_bytes_per_ns

    def roofline_ns(self, flops: float, size_bytes: float, dtype: str) -> float:
        """The least time of an operator: 100 % of the peaks."""
        return max(flops / self.peak(dtype), size_bytes / self.bytes_per_ns)

    def formula_ns(self, flops: float, size_bytes: float, dtype: str) -> float:
        """The time of an operator without measurement."""
        formula = self.formula
        compute = flops / (formula.compute_efficiency * self.peak(dtype))
        return max(compute, size_bytes / (formula.memory_efficiency * self.bytes_per_ns)) + formula.kernel_ns


def device_presets() -> list[str]:
    """Names of the presets, sorted."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def load_device(name_or_path: str | Path) -> DeviceProfile:
    """A preset by name, or a profile file in the same form.

    Raises InputError when there is none, or a field is missing, unknown or not a number in range.
    """
    name = str(name_or_path)
    preset = _PRESETS / f"{name}.yaml"
    path = preset if Path(name).name == name and preset.is_file() else Path(name).expanduser()
    if not path.is_file():
        known = device_presets()
        close = get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        message = f"no preset or file is called {name!r}"
        raise InputError(message, where="device", remedy=f"{hint}presets: {', '.join(known)}; or a profile file")
    return _profile(read_mapping(path), path)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that is a mapping; InputError otherwise."""
    try:
        data = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise InputError(f"not YAML: {error.problem}", where=where, remedy="correct the file") from error
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=str(path), remedy="give a YAML file") from error
    if not isinstance(data, dict):
        raise InputError("not a mapping", where=str(path), remedy="give a profile as the presets are written")
    return data


def number(data: dict[str, Any], field_name: str, where: str, least: float = 0.0, most: float = math.inf) -> float:
    """``data[field_name]`` as a finite number from ``least`` to ``most``; InputError otherwise."""
    value = data.get(field_name)
    bounds = f"a number from {least:g}" + (f" to {most:g}" if most < math.inf else "")
    if value is None:
        raise InputError("the field is missing", where=f"{where}: {field_name}", remedy=bounds)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most:
        raise InputError(f"{value!r} is not {bounds}", where=f"{where}: {field_name}", remedy=bounds)
    return float(value)


_FIELDS = {
    "name", "device", "memory_mib", "bandwidth_gb_s", "tflops", "link_gb_s", "network_gb_s", "devices_per_node",
    "tables", "source", "formula", "decode_skew", "launches_per_step", "fit",
}  # fmt: skip


def _profile(data: dict[str, Any], path: Path) -> DeviceProfile:
    where = str(path)
    for unknown in sorted(map(str, data.keys() - _FIELDS)):
        close = get_close_matches(unknown, _FIELDS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"one of {', '.join(sorted(_FIELDS))}"
        raise InputError("unknown field", where=f"{where}: {unknown}", remedy=remedy)
    tflops, formula = data.get("tflops"), data.get("formula")
    if not isinstance(tflops, dict) or not isinstance(formula, dict):
        missing = "formula" if isinstance(tflops, dict) else "tflops"
        raise InputError("the field is missing or not a mapping", where=f"{where}: {missing}", remedy="see a preset")
    tables: dict[str, Any] = {}
    if data.get("tables"):
        table_path = path.parent / str(data["tables"])
        if not table_path.is_file():
            raise InputError(f"no file {table_path}", where=f"{where}: tables", remedy="a file, or leave it out")
        tables = _read_tables(table_path)
    launches = data.get("launches_per_step")
    fit = data.get("fit") or {}
    if not isinstance(fit, dict):
        raise InputError(
            "not a mapping", where=f"{where}: fit", remedy="leave it out, or as testbed calibrate writes it"
        )
    tiny = 1e-9
    return DeviceProfile(
        name=str(data.get("name", path.stem)),
        device=str(data.get("device", path.stem)),
        memory_bytes=int(number(data, "memory_mib", where, 1) * MIB),
        bytes_per_ns=number(data, "bandwidth_gb_s", where, tiny),
        flops_per_ns={str(k): 1e3 * number(tflops, k, f"{where}: tflops", tiny) for k in tflops},
        link_bytes_per_ns=number(data, "link_gb_s", where, tiny),
        devices_per_node=int(number(data, "devices_per_node", where, 1)),
        formula=Formula(
            compute_efficiency=number(formula, "compute_efficiency", where, tiny, 1),
            memory_efficiency=number(formula, "memory_efficiency", where, tiny, 1),
            kernel_ns=number(formula, "kernel_ns", where),
            sampling_ns=number(formula, "sampling_ns", where),
            link_efficiency=number(formula, "link_efficiency", where, tiny, 1),
            all_reduce_ns=number(formula, "all_reduce_ns", where),
        ),
        decode_skew=number(data, "decode_skew", where, 0, 1),
        source=str(data.get("source", "")),
        tables=tables,
        launches_per_step=None if launches is None else int(number(data, "launches_per_step", where, 1)),
        fit=fit,
        network_bytes_per_ns=None if data.get("network_gb_s") is None else number(data, "network_gb_s", where, tiny),
    )


def _read_tables(path: Path) -> dict[str, Any]:
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where=str(path), remedy="calibrate or derive it again") from error
    if not isinstance(tables, dict):
        raise InputError("not a mapping of operators", where=str(path), remedy="calibrate or derive it again")
    return tables
