"""What the device is told, held against a naive device: a page of its memory holds tokens in place of keys and values.

At every step each row reads its whole context through the device's own page table. It must find exactly its request's
tokens, wherever they came from: computed, cached, published and replaced by the tree's pages, retracted, fed back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

from testbed.batch import Batch
from testbed.engine.builder import InputBuilder
from testbed.engine.inputs import StepInputs, StepOutputs
from testbed.engine.options import DeviceInfo
from testbed.request import Request
from testbed.runtime.oracle import Oracle
from testbed.runtime.real import RealDevice
from testbed.runtime.wall import WallClock
from testbed.scheduler.scheduler import Scheduler
from testbed.tokens import oracle_key, token_ids
from tests.properties.draws import World, worlds
from tests.properties.world import VOCABULARY, run


class Answered(NamedTuple):
    outputs: StepOutputs

    def wait(self) -> StepOutputs:
        return self.outputs


class TokenMemory:
    """An engine's device that remembers tokens by page; ``expected``: what each row of the next step has to read."""

    def __init__(self, slots: int, kv_tokens: int, page_size: int) -> None:
        width = kv_tokens // page_size + 2
        self.info = DeviceInfo("naive", "cpu", "none", kv_tokens, kv_tokens, width, VOCABULARY, ())
        self.page_size = page_size
        self.table = np.zeros((slots + 1, width), np.int32)
        self.memory = np.full((kv_tokens // page_size + 1) * page_size, -1, np.int64)
        self.relay: dict[tuple[int, int], int] = {}
        self.expected: list[NDArray[np.int32]] = []
        self.compared = 0

    def launch(self, inputs: StepInputs) -> Answered:
        self.table.reshape(-1)[inputs.places] = inputs.pages
        rows = list(zip(inputs.prefill_slots, inputs.prefix_lens + np.diff(inputs.starts), strict=True))
        self._write(inputs.token_slots, inputs.token_positions, inputs.token_ids)
        decodes = list(zip(inputs.decode_slots.tolist(), inputs.positions.tolist(), strict=True))
        self._write(inputs.decode_slots, inputs.positions, np.array([self.relay.pop(row) for row in decodes], np.int64))
        rows += [(slot, position + 1) for slot, position in decodes]
        for (slot, length), expected in zip(rows, self.expected, strict=True):
            read = self.memory[self._places(np.full(length, slot), np.arange(length))]
            assert np.array_equal(read, expected), f"slot {slot} at {length} reads foreign tokens"
            self.compared += 1
        draws = [*inputs.row_slots.tolist(), *inputs.decode_slots.tolist()]
        for slot, (_, length), token in zip(draws, rows, inputs.forced.tolist(), strict=True):
            self.relay[slot, int(length)] = token
        return Answered(StepOutputs(inputs.index, inputs.forced))

    def _places(self, slots: Any, positions: Any) -> Any:
        return self.table[slots, positions // self.page_size] * self.page_size + positions % self.page_size

    def _write(self, slots: Any, positions: Any, tokens: Any) -> None:
        self.memory[self._places(slots, positions)] = tokens


class CheckedDevice(RealDevice):
    """Says what each row has to read."""

    def work(self, batch: Batch, defer_sampling: bool, after: object = None) -> Any:
        rows = [(p.request, p.prefix_tokens + p.new_tokens) for p in batch.prefills]
        rows += list(zip(batch.decodes, batch.seq_lens.tolist() if batch.decodes else (), strict=True))
        memory: Any = self.device
        memory.expected = [whole(request, length) for request, length in rows]
        return super().work(batch, defer_sampling)


def whole(request: Request, length: int) -> NDArray[np.int32]:
    """The first ``length`` tokens of prompt and output."""
    prompt = request.fill_ids[: request.prompt_tokens]
    return np.concatenate((prompt, token_ids(oracle_key(0, request.rid), 0, length, VOCABULARY)))[:length]


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=150, derandomize=True)
@given(worlds())
def test_every_row_reads_its_own_tokens(world: World) -> None:
    memories: list[TokenMemory] = []

    def device(clock: WallClock, oracle: Oracle, scheduler: Scheduler) -> CheckedDevice:
        memory = TokenMemory(scheduler.memory.slots.count, world.kv_tokens, world.config.page_size)
        memories.append(memory)
        builder = InputBuilder(scheduler.memory.slots, world.config.page_size, memory.info.table_width, 0)
        return CheckedDevice(clock, memory, builder, oracle, forced=True)  # type: ignore[arg-type]

    run(world.config, world.jobs, kv_tokens=world.kv_tokens, device_of=device)
    assert memories[0].compared > 0
