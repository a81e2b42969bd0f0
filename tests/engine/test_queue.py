"""What of the CUDA queue needs no CUDA: places in the staging buffer, two clocks made one, padding to a graph."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.engine.graphs import DecodeGraphs
from testbed.engine.queue import ALIGNMENT, WAKE_NS, aligned_places, within

SPARE = 9
QUICK = settings(max_examples=100, deadline=None, derandomize=True)
times = st.integers(0, 10**9)


@QUICK
@given(st.lists(st.integers(0, 40), max_size=12))
def test_staged_arrays_are_aligned_and_apart(lengths: list[int]) -> None:
    begins, total = aligned_places(lengths)
    taken = [place for begin, length in zip(begins, lengths, strict=True) for place in range(begin, begin + length)]
    assert all(begin % ALIGNMENT == 0 for begin in begins)
    assert len(set(taken)) == sum(lengths)
    assert all(place < total for place in taken)
    assert total <= sum(lengths) + ALIGNMENT * len(lengths)


@QUICK
@given(times, times, st.booleans())
def test_an_event_is_neither_in_the_future_nor_long_past_for_who_waited(seen: int, now: int, waited: bool) -> None:
    when = within(seen, now, waited)
    assert when <= now
    assert not waited or when >= now - WAKE_NS
    if seen <= now and (not waited or seen >= now - WAKE_NS):
        assert when == seen


class FakeGraph:
    """Replays what was captured: the same function over the same buffers."""

    def __init__(self, slots: Tensor, positions: Tensor) -> None:
        self._inputs = (slots, positions)
        self.logits = torch.empty(len(slots), 2)

    def replay(self) -> None:
        self.logits.copy_(torch.stack(self._inputs, dim=1))


def graphs_of(sizes: list[int]) -> DecodeGraphs:
    """What the constructor captures on CUDA, of fake graphs."""
    graphs = object.__new__(DecodeGraphs)
    graphs.sizes, graphs._spare = sizes, SPARE
    graphs._slots = torch.full((sizes[-1],), SPARE, dtype=torch.int32)
    graphs._positions = torch.zeros(sizes[-1], dtype=torch.int32)
    fakes = {size: FakeGraph(graphs._slots[:size], graphs._positions[:size]) for size in sizes}
    graphs._graphs = {size: (fake, fake.logits) for size, fake in fakes.items()}  # type: ignore[misc]
    return graphs


@QUICK
@given(st.lists(st.integers(1, 8), min_size=1, max_size=10))
def test_a_batch_takes_the_next_larger_graph_and_pads_with_the_spare_slot(batches: list[int]) -> None:
    graphs = graphs_of([1, 2, 4, 8])
    for rows in batches:
        slots = torch.arange(20, 20 + rows, dtype=torch.int32)
        positions = torch.arange(100, 100 + rows, dtype=torch.int32)
        size = next(size for size in graphs.sizes if size >= rows)
        assert graphs.fits(rows)
        assert torch.equal(graphs.replay(slots, positions), torch.stack((slots, positions), dim=1).float())
        padding = graphs._graphs[size][1][rows:]
        assert padding.tolist() == [[SPARE, 0]] * (size - rows)
    assert not graphs.fits(9)
    assert not graphs.fits(0)
