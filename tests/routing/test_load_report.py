"""A load report beside a recount from requests, page tables and messages, after every step of small worlds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from testbed.messages import BatchGenerateRequest, GenerateRequest, LoadReport
from testbed.request import NEVER
from testbed.scheduler import load
from testbed.scheduler.load import load_report
from testbed.scheduler.scheduler import Scheduler
from tests.properties.draws import World, worlds
from tests.properties.world import Job, burst, engine, run


def recount(scheduler: Scheduler, processed: int) -> LoadReport:
    requests = list(scheduler.requests.values())
    holders = [request for request in requests if request.slot != NEVER]
    memory = scheduler.memory
    rows = [
        memory.slots.pages[request.slot, : -(-scheduler.allocated_tokens(request) // memory.page_size)].tolist()
        for request in holders
    ]
    pages = len({page for row in rows for page in row}) + memory.allocator.quarantined_pages
    uncomputed = [len(request.fill_ids) - max(request.kv_tokens, 0) for request in holders if not request.in_running]
    arrivals = [message for _, message in scheduler.recorder.journal.arrivals]
    received = sum(len(each.requests) for each in arrivals if isinstance(each, BatchGenerateRequest))
    return LoadReport(
        running=len(holders),
        waiting=len(requests) - len(holders),
        used_tokens=pages * memory.page_size,
        waiting_tokens=sum(len(request.fill_ids) for request in requests if request.slot == NEVER) + sum(uncomputed),
        steps=processed,
        received=received + sum(isinstance(each, GenerateRequest) for each in arrivals),
    )


def reported(world: World, **how: Any) -> list[LoadReport]:
    """The reports of every step, each held to the recount."""
    reports: list[LoadReport] = []

    def before(scheduler: Scheduler, runtime: Any) -> None:
        send = runtime.send_tokens

        def sending(batch: Any, result: Any) -> int:
            reports.append(load.load_report(scheduler))
            assert reports[-1] == recount(scheduler, len(reports))
            sent_ns: int = send(batch, result)
            return sent_ns

        runtime.send_tokens = sending

    run(world.config, world.jobs, kv_tokens=world.kv_tokens, before=before, **how)
    return reports


@settings(max_examples=60, deadline=None, derandomize=True)
@given(worlds())
def test_a_report_says_how_things_stand(world: World) -> None:
    reports = reported(world)
    assert [report.steps for report in reports] == list(range(1, len(reports) + 1))
    assert [report.received for report in reports] == sorted(report.received for report in reports)


REFUSED = World(
    engine(max_queued_requests=2, chunked_prefill_size=8, max_running_requests=2),
    200,
    [*burst(5, prompt=20, outputs=6), Job("late", (("p", 9),), 3, arrival_ns=10**9)],
)


def test_refused_requests_are_covered_too() -> None:
    assert reported(REFUSED, prove=False)[-1].received == 6


def test_a_report_that_forgets_the_refused_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the router would take later requests for reported ones."""

    def forgetting(scheduler: Scheduler) -> LoadReport:
        report = load_report(scheduler)
        fields = {name: getattr(report, name) for name in report.__struct_fields__}
        return LoadReport(**{**fields, "received": scheduler.received})

    monkeypatch.setattr(load, "load_report", forgetting)
    with pytest.raises(AssertionError):
        reported(REFUSED, prove=False)


def test_the_worlds_are_not_empty() -> None:
    """Chunked, waiting and shared at once: each figure of a report is above zero somewhere."""
    jobs = [Job(f"s{i}", (("stem", 30), (f"own {i}", 9)), 5) for i in range(6)]
    reports = reported(World(engine(chunked_prefill_size=16, max_running_requests=3), 120, jobs))
    table = np.array([[each.running, each.waiting, each.used_tokens, each.waiting_tokens] for each in reports])
    assert (table.max(axis=0) > 0).all()
    assert reports[-1].waiting == reports[-1].running == 0
