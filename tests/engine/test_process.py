"""A device in a process of its own, over several runs and after its end."""

from __future__ import annotations

import numpy as np
import pytest

from testbed.engine.inputs import StepInputs
from testbed.engine.process import ProcessDevice
from tests.engine.machine import prefill, tiny_device

ENDING_S = 60


def test_results_that_an_interrupted_run_left_are_passed_over() -> None:
    """Steps of another run have the same numbers."""
    with tiny_device(64, in_process=False) as device:
        expected = [device.launch(prefill(0, tokens)).wait().token_ids.tolist() for tokens in (3, 9)]
        assert expected[0] != expected[1]
        for index in range(2):
            device.launch(prefill(index, 3))
        assert device.launch(prefill(0, 9)).wait().token_ids.tolist() == expected[1]


def test_the_reason_of_a_worker_that_ended_is_told_by_the_next_launch() -> None:
    """Under overlap a step is launched before the failure of the one before it is read."""
    with tiny_device(64, in_process=False) as device:
        assert isinstance(device, ProcessDevice)
        device.launch(prefill(0, 3))
        nobody_left = StepInputs(1, decode_slots=np.zeros(1, np.int32), positions=np.full(1, 40, np.int32))
        device.launch(nobody_left)
        device._process.wait(ENDING_S)
        with pytest.raises(RuntimeError, match="a row decodes a token that no step has left for it"):
            device.launch(prefill(2, 3))
