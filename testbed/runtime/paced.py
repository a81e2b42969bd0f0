"""The modelled device on the wall clock: a step takes the time that the cost model says, for real. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, StepCost, StepResult
from testbed.costs import CostModel
from testbed.request import NO_TOKENS, Request
from testbed.runtime.modelled import Activations, device_time, price_batch, ready_ns
from testbed.runtime.oracle import Oracle
from testbed.runtime.wall import WallClock


class PacedDevice:
    """An in-order device that is a promise to be done at a known time; its tokens are the oracle's.

    Where a grammar forbids the oracle's token, another one is taken instead, and it is the grammar that ends the
    request: with an end of sequence as soon as it allows one.
    """

    def __init__(
        self,
        clock: WallClock,
        cost_model: CostModel,
        oracle: Oracle | None,
        eos_token_ids: Collection[int] = (),
        activation_ns: Callable[[int], int] = lambda tokens: 0,
    ) -> None:
        """``oracle``: None where no tokens are made: a pipeline's stages before the last. ``eos_token_ids``: the ends
        of sequence that grammars know. ``activation_ns``: the time that the activations of so many tokens take to the
        next stage."""
        self.clock = clock
        self.free_ns = 0
        """When the last launch will have ended."""
        self._cost_model = cost_model
        self._oracle = oracle
        self._eos_token_ids = tuple(eos_token_ids)
        self.activation_ns = activation_ns

    def work(self, batch: Batch, defer_sampling: bool, after: object = None) -> _PacedWork:
        """See wall.Device."""
        result = StepResult(*self._oracle.result(batch)) if self._oracle is not None else StepResult(NO_TOKENS)
        return _PacedWork(self, batch, price_batch(self._cost_model, batch), result, ready_ns(after))

    def within(self, masks: NDArray[np.int32], batch: Batch, result: StepResult) -> StepResult:
        """``result`` with tokens that ``masks`` allow: int32 [rows, words]."""
        token_ids, invalid = result.token_ids.copy(), []
        requests = [*(prefill.request for prefill in batch.prefills), *batch.decodes]
        stopped = [row for row in result.stopped if requests[row].grammar is None]
        for row, request in enumerate(requests):
            if request.grammar is not None:
                token = self._allowed(masks[row], int(token_ids[row]))
                token_ids[row] = max(token, 0)
                if token < 0:
                    invalid.append(row)
                elif self._stops(request, token):
                    stopped.append(row)
        return result._replace(token_ids=token_ids, stopped=tuple(stopped), invalid=tuple(invalid))

    def _allowed(self, mask: NDArray[np.int32], token: int) -> int:
        """An end of sequence, the oracle's token, or one that follows from it: the first that ``mask`` allows; -1 if
        there is none."""
        for wanted in (*self._eos_token_ids, token):
            if mask[wanted >> 5] >> (wanted & 31) & 1:
                return wanted
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        return int(allowed[token % len(allowed)]) if len(allowed) else -1

    def _stops(self, request: Request, token: int) -> bool:
        return token in self._eos_token_ids or token in request.sampling.stop_token_ids


class _PacedWork:
    __slots__ = ("_batch", "_device", "_ready_ns", "_result", "cost")

    def __init__(self, device: PacedDevice, batch: Batch, cost: StepCost, result: StepResult, ready_ns: int) -> None:
        self._device = device
        self._ready_ns = ready_ns
        self._batch = batch
        self._result = result
        self.cost: StepCost | None = cost

    def start(self) -> None:
        """See wall.Work: nothing is computed."""

    def launched(self, begin_ns: int, end_ns: int) -> None:
        """See wall.Work: from the launch follows when the device is done."""
        assert self.cost is not None
        start, end = device_time(self.cost, begin_ns, end_ns, max(self._device.free_ns, self._ready_ns))
        self._device.free_ns = end
        self._result = self._result._replace(launch_ns=begin_ns, start_ns=start, end_ns=end, graph=self.cost.graph)

    def sample(self, masks: NDArray[np.int32] | None) -> None:
        """See wall.Work: the batch has not ended before it was sampled."""
        device, result = self._device, self._result
        device.free_ns = max(result.end_ns, device.clock.now_ns())
        self._result = result._replace(end_ns=device.free_ns)
        if masks is not None:
            self._result = device.within(masks, self._batch, self._result)

    def activations(self) -> Activations:
        """See wall.Work."""
        shape = self._batch.shape
        return Activations(self._result.end_ns + self._device.activation_ns(sum(shape.new_tokens) + shape.decodes))

    def wait(self) -> StepResult:
        """See wall.Work."""
        self._device.clock.wait_until(self._result.end_ns)
        return self._result
