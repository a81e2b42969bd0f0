"""The modelled device on the wall clock: a step takes the time that the cost model says, for real. No GPU is needed."""

from __future__ import annotations

from testbed.batch import Batch, StepCost, StepResult
from testbed.costs import CostModel
from testbed.runtime.modelled import device_time, price_batch
from testbed.runtime.oracle import Oracle
from testbed.runtime.wall import WallClock


class PacedDevice:
    """An in-order device that is a promise to be done at a known time; its tokens are the oracle's."""

    def __init__(self, clock: WallClock, cost_model: CostModel, oracle: Oracle) -> None:
        self.clock = clock
        self.free_ns = 0
        """When the last launch will have ended."""
        self._cost_model = cost_model
        self._oracle = oracle

    def work(self, batch: Batch, defer_sampling: bool) -> _PacedWork:
        """See wall.Device."""
        return _PacedWork(self, price_batch(self._cost_model, batch), StepResult(*self._oracle.result(batch)))


class _PacedWork:
    __slots__ = ("_device", "_result", "cost")

    def __init__(self, device: PacedDevice, cost: StepCost, result: StepResult) -> None:
        self._device = device
        self._result = result
        self.cost: StepCost | None = cost

    def start(self) -> None:
        """See wall.Work: nothing is computed."""

    def launched(self, begin_ns: int, end_ns: int) -> None:
        """See wall.Work: from the launch follows when the device is done."""
        assert self.cost is not None
        start, end = device_time(self.cost, begin_ns, end_ns, self._device.free_ns)
        self._device.free_ns = end
        self._result = self._result._replace(launch_ns=begin_ns, start_ns=start, end_ns=end, graph=self.cost.graph)

    def sample(self, masks: object) -> None:
        """See wall.Work: the oracle does not sample."""

    def wait(self) -> StepResult:
        """See wall.Work."""
        self._device.clock.wait_until(self._result.end_ns)
        return self._result
