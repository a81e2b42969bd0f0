"""What a step costs: cost models of the device, profiles of the host, and the presets of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from testbed.costs.capacity import kv_capacity_tokens
from testbed.costs.devices import DeviceProfile, device_presets, load_device
from testbed.costs.host import HostProfile, constant_host, host_presets, load_host
from testbed.costs.model import ConstantCostModel, CostModel, OperatorCostModel
from testbed.scenario.models import load_model
from testbed.scenario.plugins import load_plugin
from testbed.scenario.schema import HostConstant

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
    "load_device",
    "load_host",
]


def build_cost_model(scenario: Scenario, stage: int = 0) -> CostModel:
    """The cost model of a scenario, for one pipeline stage.

    ``scenario.cost_model`` names the user's own, called with (model, device, engine), where device is a profile or the
    scenario's constants. Else constants give a ``ConstantCostModel`` and a profile an ``OperatorCostModel``.
    Raises InputError when a preset or file does not exist or the model does not fit the device's dtypes or parallelism.
    """
    model = load_model(scenario.model)
    device = load_device(scenario.device) if isinstance(scenario.device, str) else scenario.device.constant
    if scenario.cost_model is not None:
        return cast("CostModel", load_plugin(scenario.cost_model, where="cost_model")(model, device, scenario.engine))
    if isinstance(device, DeviceProfile):
        return OperatorCostModel(model, device, scenario.engine, stage)
    return ConstantCostModel(device)


def build_host_profile(scenario: Scenario) -> HostProfile:
    """The host profile of a scenario. Raises InputError when there is no such profile or it is not valid."""
    if isinstance(scenario.host, HostConstant):
        return constant_host(scenario.host.constant.iteration_ns)
    return load_host(scenario.host, tp=scenario.engine.parallel.tp)
