"""Request slots: one row of the page table and of the output table for each request that holds KV."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from testbed.scenario.errors import InputError


def _spread(length: int) -> int:
    """A row length of at least ``length`` for which the same column of neighbouring rows falls into different cache
    and TLB sets: an odd number of memory pages and a cache line (a decode step writes one element in every row)."""
    pages = -(-4 * length // 4096) | 1
    return (pages * 4096 + 64) // 4


def _untouched(length: int) -> NDArray[np.int32]:
    """int32 [length] in small pages that cost nothing until they are written. (numpy asks the kernel for huge pages: a
    row's first token would then zero 2 MB.)"""
    try:
        buffer = mmap.mmap(-1, 4 * length)
    except OSError as error:
        raise InputError(
            f"no address space for the page tables of so many requests ({4 * length / 1e9:.0f} GB)",
            where="engine.max_running_requests",
            remedy="lower it, or engine.context_length",
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        buffer.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(buffer, dtype=np.int32)


def slots_needed(max_running_requests: int, kv_tokens: int, page_size: int) -> int:
    """Slots of an engine: the chunked request has one beside the running ones; nobody runs without a page."""
    return min(max_running_requests, kv_tokens // page_size) + 2


class RequestSlots:
    """``count`` slots. ``pages[slot, i]`` is the page of tokens ``i * page_size ..`` of the request in ``slot``;
    ``outputs[slot, j]`` its j-th output token since it last entered the running batch.

    Both tables (int32) are flat views too (``pages_flat``), because a decode step writes one element a row. Memory is
    reserved, not touched: a slot costs only what its longest request used, and slots are reused last-in first-out.
    """

    def __init__(self, count: int, context_tokens: int, page_size: int) -> None:
        self.count = count
        self.page_stride = _spread(-(-context_tokens // page_size) + 1)
        self.output_stride = _spread(context_tokens + 1)
        self.pages_flat = _untouched(count * self.page_stride)
        self.outputs_flat = _untouched(count * self.output_stride)
        self.pages = self.pages_flat.reshape(count, self.page_stride)
        self.outputs = self.outputs_flat.reshape(count, self.output_stride)
        self.rewritten: list[tuple[int, int]] = []
        """(slot, pages): rows whose first pages were replaced behind what is computed, since the last launch: a device
        that keeps a copy of the table must be told."""
        self._free = list(range(count - 1, -1, -1))

    @property
    def available(self) -> int:
        """Free slots."""
        return len(self._free)

    def alloc(self) -> int:
        """Take a slot. Raises IndexError when none is free (admission tests ``available`` first)."""
        return self._free.pop()

    def free(self, slot: int) -> None:
        """Return a slot."""
        self._free.append(slot)

    def free_list(self) -> list[int]:
        """The free slots, for checks."""
        return self._free
