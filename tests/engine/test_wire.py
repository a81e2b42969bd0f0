"""What goes to a worker process arrives there as it was."""

from __future__ import annotations

from dataclasses import asdict, fields
from multiprocessing import Pipe
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from testbed.engine import wire
from testbed.engine.inputs import ARRAYS, SamplingNeeds, SlotSampling, StepInputs, StepOutputs
from testbed.sampling import SamplingParams

INTS = arrays(np.int32, st.integers(0, 40), elements=st.integers(-(2**31), 2**31 - 1))
FLOATS = arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(0, 3)), elements=st.floats(width=32))
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 9),
    top_k=st.sampled_from([-1, 1, 40]),
    logit_bias=st.lists(st.tuples(st.integers(0, 9), st.floats(-5, 5)), max_size=3).map(tuple),
    seed=st.none() | st.integers(0, 2**64 - 1),
    stop_token_ids=st.lists(st.integers(0, 9), max_size=3).map(tuple),
)
TOLD = st.builds(SlotSampling, st.integers(0, 9), PARAMS, st.integers(0, 2**64 - 1), st.integers(0, 9), INTS, INTS)
INPUTS = st.builds(
    StepInputs,
    st.integers(0, 2**40),
    **dict.fromkeys(ARRAYS, INTS),
    sampling=st.lists(TOLD, max_size=3),
    needs=st.builds(SamplingNeeds, st.booleans(), st.booleans(), top_logprobs=st.integers(0, 20)),
    defer_sampling=st.booleans(),
)
OUTPUTS = st.builds(StepOutputs, st.integers(0, 99), INTS, logprobs=st.none() | FLOATS, top_ids=st.none() | INTS)


def same(left: Any, right: Any) -> bool:
    """Equal dataclasses of arrays, arrays to the bit."""
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@settings(deadline=None, derandomize=True)
@given(INPUTS, OUTPUTS, st.none() | INTS)
def test_round_trip(inputs: StepInputs, outputs: StepOutputs, bitmask: Any) -> None:
    parent, worker = Pipe()
    with parent, worker:
        wire.send(parent, wire.Launch(2**40, inputs))
        wire.send(parent, wire.Sample(bitmask))
        launch, sample = wire.from_parent(worker.recv_bytes()), wire.from_parent(worker.recv_bytes())
        wire.send(worker, wire.Done(7, outputs))
        done = wire.receive_from_worker(parent)
    assert isinstance(launch, wire.Launch) and isinstance(sample, wire.Sample) and isinstance(done, wire.Done)
    assert (launch.number, done.launch) == (2**40, 7)
    assert same(asdict(launch.inputs), asdict(inputs))
    assert same(sample.bitmask, bitmask)
    assert same(asdict(done.outputs), asdict(outputs))


def test_every_array_of_a_step_travels() -> None:
    """``ARRAYS`` is what is copied to a device: no array may be forgotten."""
    others = {"index", "sampling", "needs", "defer_sampling"}
    assert {field.name for field in fields(StepInputs)} == {*ARRAYS, *others}
