"""``testbed presets``: every name that a scenario may use."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer

from testbed.scenario.describe import did_you_mean
from testbed.scenario.errors import InputError


class Kind(StrEnum):
    """What there are presets of."""

    MODELS = "models"
    DEVICES = "devices"
    HOSTS = "hosts"
    ENGINES = "engines"
    TRACES = "traces"
    WORKLOADS = "workloads"


def presets(
    kind: Annotated[str | None, typer.Argument(help=f"Only {', '.join(Kind)}.", show_default=False)] = None,
) -> None:
    """List the presets of models, devices, hosts, engines, traces and workloads."""
    listers: dict[Kind, Callable[[], dict[str, str]]] = {
        Kind.MODELS: _models,
        Kind.DEVICES: _devices,
        Kind.HOSTS: _hosts,
        Kind.ENGINES: _engines,
        Kind.TRACES: _traces,
        Kind.WORKLOADS: _workloads,
    }
    if kind is not None and kind not in list(Kind):
        hint = did_you_mean(kind, Kind)
        raise InputError(
            f"there are no presets of {kind!r}", where="presets", remedy=f"{hint} kinds: {', '.join(Kind)}".strip()
        )
    for each in [Kind(kind)] if kind else list(Kind):
        found = listers[each]()
        columns = shutil.get_terminal_size((100, 24)).columns
        width = max(map(len, found), default=0)
        print(each.value)
        for name, summary in found.items():
            lines = textwrap.wrap(summary, max(columns - width - 4, 20)) or [""]
            print(f"  {name:<{width}}  {lines[0]}".rstrip())
            for line in lines[1:]:
                print(f"  {'':<{width}}  {line}")


def _models() -> dict[str, str]:
    from testbed.scenario.models import load_model, model_presets

    models = {name: load_model(name) for name in model_presets()}
    return {name: f"{model.layers} layers, {model.kv_heads} KV heads" for name, model in models.items()}


def _devices() -> dict[str, str]:
    from testbed.costs.devices import device_presets, load_device

    devices = {name: load_device(name) for name in device_presets()}
    return {
        name: f"{device.memory_bytes / 2**30:.0f} GiB, {device.bytes_per_ns:,.0f} GB/s, "
        + (f"measured: {', '.join(sorted(device.tables))}" if device.tables else "formula only, not measured")
        for name, device in devices.items()
    }


def _hosts() -> dict[str, str]:
    from testbed.costs.host import host_presets, load_host

    return {name: " ".join(load_host(name).source.split()) for name in host_presets()}


def _engines() -> dict[str, str]:
    from testbed.scenario.engines import engine_presets

    return engine_presets()


def _traces() -> dict[str, str]:
    from testbed.workload.traces.known import KNOWN_TRACES

    return {
        name: f"{trace.licence}; {'testbed trace fetch' if trace.url else trace.note}"
        for name, trace in KNOWN_TRACES.items()
    }


def _workloads() -> dict[str, str]:
    from testbed.workload.fitted import fitted_names

    return dict.fromkeys(fitted_names(), "workload: {arrivals: NAME, lengths: NAME}")
