"""The engine's device under the wall clock: batches become arrays, outputs become results."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, StepCost, StepLogprobs, StepResult
from testbed.costs import CostModel
from testbed.engine.builder import InputBuilder
from testbed.engine.device import Device, Launched
from testbed.engine.inputs import NONE, StepInputs, StepOutputs
from testbed.request import Request
from testbed.runtime.modelled import price_batch
from testbed.runtime.oracle import Oracle
from testbed.runtime.wall import WallClock

NO_FLOATS = np.empty(0, np.float32)


class RealDevice:
    """Computes batches on an engine's device. With ``forced`` the oracle's tokens replace the computed ones, so that
    decisions can be compared with other runs; without, the oracle only says which requests end at their true length."""

    def __init__(
        self,
        clock: WallClock,
        device: Device,
        builder: InputBuilder,
        oracle: Oracle,
        *,
        forced: bool,
        cost_model: CostModel | None = None,
    ) -> None:
        """``cost_model``: only to inject a host profile's launch times, which count kernels."""
        self.clock = clock
        self.device = device
        self.builder = builder
        self.forced = forced
        self.free_ns = 0
        """When the last step that was waited for had ended."""
        self._oracle = oracle
        self._cost_model = cost_model
        self._stop_ids = frozenset(device.info.eos_token_ids)
        self._is_stop = np.zeros(device.info.vocab_size, dtype=np.bool_)
        """Tokens at which some request may stop."""
        self._is_stop[list(self._stop_ids)] = True

    def work(self, batch: Batch, defer_sampling: bool, after: object = None) -> _RealWork:
        """See wall.Device. The engine runs on one device: nothing comes ``after`` another stage."""
        cost = None if self._cost_model is None else price_batch(self._cost_model, batch)
        if self.forced:
            token_ids, stopped = self._oracle.result(batch)
        else:
            token_ids, stopped = NONE, self._oracle.stops(batch)
            self._note_stop_ids(request for request, _, _, _ in batch.prefills)
        return _RealWork(self, batch, cost, token_ids, stopped, defer_sampling)

    def _note_stop_ids(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.sampling.stop_token_ids:
                self._is_stop[list(request.sampling.stop_token_ids)] = True

    def stopped_rows(self, batch: Batch, token_ids: NDArray[np.int32]) -> list[int]:
        """Rows whose token is an end-of-sequence or stop token that their request heeds."""
        found, first = [], len(batch.prefills)
        for row in np.flatnonzero(self._is_stop[token_ids]).tolist():
            request = batch.prefills[row].request if row < first else batch.decodes[row - first]
            token = int(token_ids[row])
            if token in request.sampling.stop_token_ids or (not request.ignore_eos and token in self._stop_ids):
                found.append(row)
        return found


class _RealWork:
    __slots__ = ("_batch", "_defer", "_device", "_launch_ns", "_launched", "_stopped", "_token_ids", "cost")

    def __init__(
        self,
        device: RealDevice,
        batch: Batch,
        cost: StepCost | None,
        token_ids: NDArray[np.int32],
        stopped: tuple[int, ...],
        defer: bool,
    ) -> None:
        self._device = device
        self._batch = batch
        self._token_ids = token_ids
        self._stopped = stopped
        self._defer = defer
        self._launched: Launched | None = None
        self._launch_ns = 0
        self.cost = cost

    def start(self) -> None:
        """See wall.Work."""
        inputs: StepInputs = self._device.builder.build(self._batch, self._token_ids, self._defer)
        self._launched = self._device.device.launch(inputs)

    def launched(self, begin_ns: int, end_ns: int) -> None:
        """See wall.Work."""
        self._launch_ns = begin_ns

    def sample(self, masks: NDArray[np.int32] | None) -> None:
        """See wall.Work."""
        assert self._launched is not None
        self._launched.sample(masks)

    def activations(self) -> object:
        """See wall.Work. Raises NotImplementedError: the engine runs on one device."""
        raise NotImplementedError("the engine runs on one device")

    def wait(self) -> StepResult:
        """See wall.Work. An in-order device: a step begins after its launch and after the step before."""
        assert self._launched is not None
        outputs = self._launched.wait()
        device = self._device
        origin = device.clock.origin_ns
        start = max(outputs.start_ns - origin, self._launch_ns, device.free_ns)
        device.free_ns = end = max(outputs.end_ns - origin, start)
        token_ids, stopped = outputs.token_ids, list(self._stopped)
        invalid: tuple[int, ...] = ()
        if not device.forced:
            if (token_ids < 0).any():
                invalid = tuple(np.flatnonzero(token_ids < 0).tolist())
                token_ids = np.maximum(token_ids, 0)
            stopped += device.stopped_rows(self._batch, token_ids)
        return StepResult(
            token_ids,
            tuple(stopped),
            self._launch_ns,
            start,
            end,
            outputs.graph,
            _logprobs(outputs),
            invalid,
        )


def _logprobs(outputs: StepOutputs) -> StepLogprobs | None:
    prompt = NO_FLOATS if outputs.prompt_logprobs is None else outputs.prompt_logprobs
    if outputs.logprobs is not None:
        assert outputs.top_ids is not None and outputs.top_logprobs is not None
        return StepLogprobs(outputs.logprobs, outputs.top_ids, outputs.top_logprobs, prompt)
    if len(prompt):
        nothing = np.full(len(outputs.token_ids), np.nan, np.float32)
        return StepLogprobs(nothing, NONE.reshape(0, 0), NO_FLOATS.reshape(0, 0), prompt)
    return None
