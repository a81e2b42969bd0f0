"""What a step costs: cost models of the device, profiles of the host, and the presets of both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from testbed.costs.capacity import kv_capacity_tokens, kv_page_bytes, stage_layers, stage_weight_bytes
from testbed.costs.devices import DeviceProfile, device_presets, load_device
from testbed.costs.host import HostProfile, constant_host, host_presets, load_host
from testbed.costs.model import ConstantCostModel, CostModel, OperatorCostModel, complete
from testbed.scenario.models import load_model
from testbed.scenario.plugins import load_callable, own_faults
from testbed.scenario.schema import ConstantDevice, HostConstant

if TYPE_CHECKING:
    from testbed.scenario.schema import Scenario

__all__ = [
    "ConstantCostModel",
    "CostModel",
    "DeviceProfile",
    "HostProfile",
    "OperatorCostModel",
    "build_cost_model",
    "build_host_profile",
    "device_presets",
    "host_presets",
    "kv_capacity_tokens",
    "kv_page_bytes",
    "load_device",
    "load_host",
    "stage_layers",
    "stage_weight_bytes",
]


def build_cost_model(scenario: Scenario, stage: int = 0, base_dir: str | Path = ".") -> CostModel:
    """The cost model of a scenario, for one pipeline stage; relative paths in it are looked for in ``base_dir`` first.

    ``scenario.cost_model`` names the user's own, called with (model, device, engine), where device is a profile or the
    scenario's constants, and in a pipeline also the number of the stage; its result needs one method,
    ``price(shape) -> StepCost``. Else constants give a ``ConstantCostModel`` and a profile an ``OperatorCostModel``.
    Raises InputError when a preset or file does not exist or the model does not fit the device's dtypes or parallelism.
    """
    model = load_model(_beside(scenario.model, base_dir))
    device: DeviceProfile | ConstantDevice
    if isinstance(scenario.device, str):
        device = load_device(_beside(scenario.device, base_dir))
    else:
        device = scenario.device.constant
    if scenario.cost_model is not None:
        stages = (stage,) if scenario.engine.parallel.pp > 1 else ()
        takes = ("model", "device", "engine", "stage")[: 3 + len(stages)]
        build = load_callable(scenario.cost_model, base_dir, where="cost_model", takes=takes)
        with own_faults():
            return complete(build(model, device, scenario.engine, *stages), scenario.cost_model)
    if isinstance(device, DeviceProfile):
        return OperatorCostModel(model, device, scenario.engine, stage, scenario.seed)
    layers = stage_layers(model, scenario.engine.parallel)
    return ConstantCostModel(device, layers[stage], model.layers)


def build_host_profile(scenario: Scenario, base_dir: str | Path = ".") -> HostProfile:
    """The host profile of a scenario. Raises InputError when there is no such profile or it is not valid."""
    if isinstance(scenario.host, HostConstant):
        return constant_host(scenario.host.constant.iteration_ns)
    return load_host(_beside(scenario.host, base_dir), tp=scenario.engine.parallel.tp)


def _beside(name: str, base_dir: str | Path) -> str:
    """``name``, or the path of that name in ``base_dir`` when a file or a model folder is there."""
    path = Path(base_dir) / name
    return str(path) if path.is_file() or (path / "config.json").is_file() else name
