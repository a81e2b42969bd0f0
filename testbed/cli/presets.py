"""``testbed presets``: every name that a scenario may use."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """What there are presets of."""

    MODELS = "models"
    DEVICES = "devices"
    HOSTS = "hosts"
    ENGINES = "engines"
    TRACES = "traces"
    WORKLOADS = "workloads"


def presets(
    kind: Annotated[Kind | None, typer.Argument(help="Only these.", show_default=False)] = None,
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
    for each in [kind] if kind else list(Kind):
        found = listers[each]()
        width = max(map(len, found), default=0)
        print(each.value)
        for name, summary in found.items():
            print(f"  {name:<{width}}  {summary}".rstrip())


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

    return {name: textwrap.shorten(load_host(name).source, 100, placeholder=" ...") for name in host_presets()}


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
