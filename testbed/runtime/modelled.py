"""What virtual time and the wall clock share: how a launch on a modelled device is priced, and how a run can fail."""

from __future__ import annotations

from typing import NamedTuple, NewType

from testbed.batch import Batch, StepCost
from testbed.costs import CostModel
from testbed.scenario.errors import InputError


class Deadlock(InputError):
    """Nothing can happen any more, and requests are still open: a strategy or a rule that leaves them waiting for
    ever."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            where="engine",
            remedy="a batching strategy or policy of your own never schedules them, or rules.can_stall (preset "
            "sglang-0.5.1) lets a request that no longer fits block the queue: set it to false, or raise kv_tokens",
        )


class LoopReturned(InputError):
    """An event loop has come to its end by itself."""

    def __init__(self) -> None:
        remedy = "let it go on for ever (while True): its runtime ends it"
        super().__init__("the event loop has returned", where="engine.loop", remedy=remedy)


class NoPort(InputError):
    """An event loop waits for something that neither clock knows of."""

    def __init__(self) -> None:
        remedy = "await the steps of testbed/loops/base.py, and loop.cpu.sleep(ns) in place of asyncio.sleep"
        super().__init__("the event loop has awaited something that is not a port", where="engine.loop", remedy=remedy)


class OutOfMemory(InputError):
    """The engine's rules admitted more than memory holds."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"the KV pool is exhausted where the engine's rules did not look: {message}",
            where="engine.kv_tokens",
            remedy="SGLang 0.5.1 dies here (Prefill out of memory); raise kv_tokens, or set rules.can_stall: false",
        )


def price_batch(cost_model: CostModel, batch: Batch) -> StepCost:
    """The cost of a batch; a pure decode step takes the short way."""
    shape = batch.shape
    if batch.prefills:
        return cost_model.price(shape)
    return cost_model.price_decode(shape.decodes, shape.context_tokens, shape.context_max)


Activations = NewType("Activations", int)
"""What a stage of a modelled pipeline hands to the next one: when it is on that one's device (ns)."""


class DeviceTime(NamedTuple):
    """When an in-order device works on a step (ns)."""

    start_ns: int
    end_ns: int


def ready_ns(after: object) -> int:
    """When the activations that a launch waits for are there; 0 for a launch that waits for none."""
    return after if isinstance(after, int) else 0


def device_time(cost: StepCost, begin_ns: int, launched_ns: int, free_ns: int) -> DeviceTime:
    """An in-order device starts a step when it is launched and the device is free.

    ``begin_ns`` .. ``launched_ns``: the host's launch. A CUDA graph starts when the launch is done. Eager kernels are
    pipelined with it: the device starts at the first kernel and is never faster than the host launches.
    """
    if cost.graph:
        start = max(launched_ns, free_ns)
        return DeviceTime(start, start + cost.gpu_ns)
    start = max(begin_ns + (launched_ns - begin_ns) // max(cost.kernels, 1), free_ns)
    return DeviceTime(start, max(start + cost.gpu_ns, launched_ns))
