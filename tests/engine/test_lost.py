"""A GPU may vanish under any call of a step; whoever runs the scenario is told so."""

from __future__ import annotations

import pytest
import torch

from testbed.engine.build import LocalDevice
from testbed.engine.device import DeviceLost
from testbed.engine.queue import CpuQueue
from tests.engine.machine import prefill, tiny_device


@pytest.mark.parametrize("call", ["stage", "begin", "fetch", "end"])
def test_every_call_of_a_step_may_be_the_one(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanished(*arguments: object) -> None:
        raise torch.AcceleratorError("CUDA error: the device is gone\nmore")

    with tiny_device(64) as device:
        assert isinstance(device, LocalDevice)
        device.launch(prefill(0, 3)).wait()
        monkeypatch.setattr(CpuQueue, call, vanished)
        with pytest.raises(DeviceLost) as told:
            device.launch(prefill(1, 3)).wait()
    assert told.value.message == "the device is lost: CUDA error: the device is gone"
