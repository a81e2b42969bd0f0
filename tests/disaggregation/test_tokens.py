"""Whatever the loops, ratios, pages and memory: every request gets the tokens that one engine alone would give it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.runtime.links import DrawnFaults, LinkSpec
from testbed.scenario.schema import ConstantDevice
from tests.disaggregation.deployment import DESIGNS, Deployment, Setup, abort, run
from tests.properties import world
from tests.properties.world import DEVICE, Job, burst, engine

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
RATIOS = [(1, 1), (2, 1), (1, 2)]
JOBS = [
    Job("r0", (("stem", 20), ("a", 9)), 12),
    Job("r1", (("stem", 20), ("b", 4)), 9, max_new_tokens=20),
    Job("r2", (("c", 33),), 1, arrival_ns=5_000),
    Job("r3", (("stem", 20), ("d", 7)), 14, arrival_ns=20_000),
    Job("r4", (("e", 5),), 30, arrival_ns=30_000),
    Job("r5", (("f", 6),), 1, max_new_tokens=7, arrival_ns=30_000),
]


def alone(jobs: list[Job]) -> dict[str, list[int]]:
    return world.run(engine(), jobs).streams()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("prefill_loop", DESIGNS)
@pytest.mark.parametrize("decode_loop", DESIGNS)
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_the_same_tokens_as_one_engine(
    ratio: tuple[int, int], prefill_loop: str, decode_loop: str, page_size: int
) -> None:
    fields: dict[str, Any] = {"page_size": page_size, "chunked_prefill_size": 16}
    loops = {"prefill_loop": prefill_loop, "decode_loop": decode_loop}
    deployment = run(Setup(*ratio, engine=fields, **loops), JOBS)
    assert deployment.streams() == alone(JOBS)
    reads = sum(layer.reads for node in deployment.nodes.values() for layer in node.layers)
    assert reads > 1500, "nobody looks at what lies in memory"


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("prefill_loop", DESIGNS)
@pytest.mark.parametrize("decode_loop", DESIGNS)
@pytest.mark.parametrize("page_size", [1, 4])
def test_retraction_never_changes_tokens(
    ratio: tuple[int, int], prefill_loop: str, decode_loop: str, page_size: int
) -> None:
    jobs = burst(6, prompt=12, outputs=36)
    loops = {"prefill_loop": prefill_loop, "decode_loop": decode_loop}
    deployment = run(Setup(*ratio, decode_tokens=64, engine={"page_size": page_size}, **loops), jobs)
    assert deployment.counter("retractions") > 0
    assert deployment.streams() == alone(jobs)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("decode_loop", DESIGNS)
@pytest.mark.parametrize("page_size", [1, 4])
def test_a_pipeline_may_prefill(stages: int, decode_loop: str, page_size: int) -> None:
    """Every stage decides alike and sends its own layers."""
    fields: dict[str, Any] = {"page_size": page_size, "chunked_prefill_size": 16}
    deployment = run(Setup(stages=stages, decode_loop=decode_loop, engine=fields), JOBS)
    assert deployment.streams() == alone(JOBS)


def test_kv_that_was_retracted_is_never_computed_again() -> None:
    """Every prompt is computed once, on the prefill side; the decode side computes one token a row and step."""
    deployment = run(Setup(decode_tokens=64), burst(5, prompt=12, outputs=36))
    assert deployment.counter("retractions") > 0
    steps = {name: node.recorder._step_columns() for name, node in deployment.nodes.items()}
    assert steps["prefill 0"]["new_tokens"].sum() == 5 * 12 and steps["prefill 0"]["decode_rows"].sum() == 0
    decoded = steps["decode 0"]["decode_rows"].sum() - steps["decode 0"]["extra_rows"].sum()
    assert steps["decode 0"]["new_tokens"].sum() == 0 and decoded == 5 * 35


def test_cached_prefixes_are_sent_and_reported() -> None:
    """What the prefill engine has cached is not computed, but sent; its user hears of it."""
    later = [Job("r", (("p", 40),), 3), Job("s", (("p", 40), ("q", 5)), 3, arrival_ns=10**9)]
    deployment = run(Setup(), later)
    assert {answer.rid: answer.cached_tokens for answer in deployment.answers} == {"r": 0, "s": 40}
    assert deployment.nodes["prefill 0"].recorder._step_columns()["new_tokens"].sum() == 45


def test_after_a_long_silence_all_is_as_before() -> None:
    """24 hours in which nobody says anything (menu E8)."""
    day = 24 * 3600 * 10**9
    jobs = [*burst(2), *(job._replace(rid=f"{job.rid} later", arrival_ns=day) for job in burst(2))]
    deployment = run(Setup(), jobs)
    assert deployment.streams() == alone(jobs)


@st.composite
def setups(draw: st.DrawFn) -> tuple[Setup, list[Job]]:
    """Small pools, slow devices and links, so that rare states are common."""
    page_size = draw(st.sampled_from([1, 1, 3, 4, 16]))
    decode_tokens = draw(st.sampled_from([40, 50, 64, 90, 200])) if page_size < 16 else draw(st.sampled_from([64, 96]))
    largest = min(decode_tokens // page_size * page_size - 8, 70)
    jobs = []
    for i in range(draw(st.integers(1, 9))):
        prompt = draw(st.integers(1, largest - 12))
        outputs = draw(st.integers(1, min(40, largest - prompt)))
        stem = draw(st.integers(0, prompt))
        parts = ((draw(st.sampled_from("ab")), stem), (f"own {i}", prompt - stem))
        more = draw(st.sampled_from([0, 0, 3, 200]))
        arrival = draw(st.sampled_from([0, 0, 1, 20_000, 60_000, 200_000]))
        limit = outputs + more if more else None
        jobs.append(Job(f"r{i}", tuple(part for part in parts if part[1]), outputs, limit, arrival))
    setup = Setup(
        prefills=draw(st.sampled_from([1, 1, 2])),
        decodes=draw(st.sampled_from([1, 1, 2])),
        stages=draw(st.sampled_from([1, 1, 2, 3])),
        prefill_loop=draw(st.sampled_from(DESIGNS)),
        decode_loop=draw(st.sampled_from(DESIGNS)),
        prefill_tokens=draw(st.sampled_from([96, 128, 400])) if page_size < 16 else 160,
        decode_tokens=decode_tokens,
        engine={
            "page_size": page_size,
            "chunked_prefill_size": draw(st.sampled_from([-1, 16, 17, 32])),
            "max_running_requests": draw(st.sampled_from([1, 2, 4, 8])),
            "prefix_cache": draw(st.sampled_from(["radix", "chunk"])),
        },
        terms={"reserved_decode_tokens": draw(st.sampled_from([2, 4, 4, 512]))},
        link=LinkSpec(
            gb_per_s=draw(st.sampled_from([0.001, 0.01, 1.0])),
            latency_ns=draw(st.sampled_from([0, 500, 20_000])),
            shared_gb_per_s=draw(st.sampled_from([None, 0.5])),
        ),
        decode_device=draw(st.sampled_from([DEVICE, ConstantDevice(decode_ns=50_000)])),
        host_ns=draw(st.sampled_from([0, 0, 1_500])),
    )
    return setup, jobs


def patient(setup: Setup) -> Setup:
    """Nothing times out."""
    hour = 3600 * 10**9
    return Setup(**{**vars(setup), "terms": {**setup.terms, "bootstrap_timeout_ns": hour, "transfer_timeout_ns": hour}})


@settings(QUIET, max_examples=100)
@given(setups())
def test_everybody_is_served(drawn: tuple[Setup, list[Job]]) -> None:
    setup, jobs = drawn
    deployment = run(patient(setup), jobs)
    assert all(answer.status == 200 for answer in deployment.answers)


@settings(QUIET, max_examples=100)
@given(setups(), st.lists(st.tuples(st.integers(0, 400_000), st.integers(0, 8)), min_size=1, max_size=4))
def test_aborts_at_drawn_moments(drawn: tuple[Setup, list[Job]], aborts: list[tuple[int, int]]) -> None:
    setup, jobs = drawn
    deployment = run(patient(setup), jobs, at=[(when, abort(f"r{which}")) for when, which in aborts])
    targets = {f"r{which}" for _, which in aborts}
    assert all(answer.status == 200 or answer.rid in targets for answer in deployment.answers)


@settings(QUIET, max_examples=30)
@given(setups(), st.integers(0, 1000))
def test_the_same_run_twice_is_the_same_bytes(drawn: tuple[Setup, list[Job]], seed: int) -> None:
    setup, jobs = drawn

    def once() -> tuple[Any, ...]:
        faults = DrawnFaults(seed, loss=0.05, duplicate=0.1, corrupt=0.1, jitter_ns=1_000)
        deployment: Deployment = run(setup, jobs, faults=faults)
        nodes = deployment.nodes.values()
        logs = [node.scheduler.decision_log.bytes() for node in nodes]
        spans = [np.array(node.recorder._spans).tobytes() for node in nodes]
        answers = [(a.rid, a.status, a.output_ids.tobytes()) for a in deployment.answers]
        return logs, spans, answers, [node.recorder.counters for node in nodes], deployment.links.counts

    assert once() == once()


@pytest.mark.parametrize("design", DESIGNS)
def test_an_abort_at_every_iteration_of_either_loop(design: str) -> None:
    """Of each request, once before each iteration of each engine: it ends once, the others get all their tokens."""
    setup = Setup(
        prefill_loop=design,
        decode_loop=design,
        prefill_tokens=96,
        decode_tokens=72,
        engine={"page_size": 4, "chunked_prefill_size": 16, "max_running_requests": 4},
    )
    jobs = [JOBS[0], JOBS[3]]
    plain = run(setup, jobs)
    ended: set[int] = set()
    for name, node in plain.nodes.items():
        for iteration in range(node.iterations):
            for job in jobs:
                deployment = run(setup, jobs, script={(name, iteration): [abort(job.rid)]})
                statuses = {answer.rid: answer.status for answer in deployment.answers}
                assert all(status == 200 or rid == job.rid for rid, status in statuses.items())
                ended.add(statuses[job.rid])
    assert ended == {200, 499}
