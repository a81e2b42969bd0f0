"""Replicas behind a router, whole: what it decides from, when reports are made, and that nobody is served otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed import Run, execute, load_scenario, simulate
from testbed.messages import GenerateRequest, LoadReport
from testbed.routing.controller import Controller
from testbed.runtime.leap import Leaper
from testbed.runtime.router import REPORT_NS, Router, RouterReports
from testbed.scenario.errors import InputError
from testbed.scenario.schema import Scenario
from testbed.scheduler.load import load_report
from tests.runtime.test_leap import differences

POLICIES = ("round_robin", "random", "shortest_queue", "least_tokens", "power_of_two", "cache_aware")


def scenario(dp: int = 3, rate_per_s: float = 40, count: int = 60, **fields: Any) -> Scenario:
    routing = {name: fields.pop(name) for name in ("policy", "report_every_steps", "hears_ends") if name in fields}
    return load_scenario(
        {
            "model": "qwen3-0.6b",
            "host": "sglang-0.5",
            "engine": {"kv_tokens": 3_000, "parallel": {"dp": dp}, **fields},
            "routing": {**routing, "balance_abs_threshold": 4},
            "workload": {
                "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s},
                "prefix": {"groups": 5, "prefix_tokens": 300, "zipf": 0.8},
                "lengths": {
                    "prompt_tokens": {"kind": "uniform", "low": 5, "high": 200},
                    "output_tokens": {"kind": "uniform", "low": 1, "high": 260},
                },
                "count": count,
            },
        }
    ).scenario


def outcome(run: Run) -> dict[str, tuple[Any, ...]]:
    columns = run.records.requests
    names = ("prompt_tokens", "output_tokens", "finish_reason")
    return dict(zip(columns["id"], zip(*(list(columns[name]) for name in names), strict=True), strict=True))


class Log:
    """What the router of a run was told, knew and chose."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[int, int, LoadReport]] = []
        """(when sent, replica, report)"""
        self.known: list[tuple[int, LoadReport]] = []
        self.decisions: list[tuple[int, int]] = []
        """(when, reports known)"""
        self.choices: dict[str, int] = {}
        send_at, reported, submit = RouterReports.send_at, Controller.reported, Controller.submit
        routed = Router.submit

        def sending(reports: RouterReports, when_ns: int, load: LoadReport) -> int:
            self.sent.append((when_ns, reports._replica, load))
            return send_at(reports, when_ns, load)

        def knowing(controller: Controller, replica: int, report: LoadReport) -> None:
            self.known.append((replica, report))
            reported(controller, replica, report)

        def choosing(controller: Controller, request: GenerateRequest) -> int:
            self.choices[request.rid] = submit(controller, request)
            return self.choices[request.rid]

        def routing(router: Router, request: GenerateRequest) -> None:
            routed(router, request)
            self.decisions.append((router._now_ns(), len(self.known)))

        patch.setattr(RouterReports, "send_at", sending)
        patch.setattr(Controller, "reported", knowing)
        patch.setattr(Controller, "submit", choosing)
        patch.setattr(Router, "submit", routing)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    return Log(monkeypatch)


@pytest.mark.parametrize("policy", POLICIES)
def test_everybody_is_served_as_by_one_engine(policy: str) -> None:
    alone = simulate(scenario(dp=1), checks="full")
    several = simulate(scenario(policy=policy), checks="full")
    assert outcome(several) == outcome(alone)
    assert len(np.unique(several.records.requests["replica"])) == 3


@pytest.mark.parametrize("policy", POLICIES[2:])
def test_leaps_change_nothing(policy: str) -> None:
    """Few requests, long gaps: most steps are leapt over."""
    rare = scenario(policy=policy, report_every_steps=3, rate_per_s=3)
    leaping, walking = simulate(rare), simulate(rare, leap=False)
    assert differences(leaping, walking) == []
    assert leaping.records.counters["steps_leapt"] > 0.3 * leaping.records.counters["steps"]


def last_known(every: int, leap: bool) -> list[tuple[int, dict[int, LoadReport]]]:
    """When each decision was made, and the last report that it knew of each replica."""
    with pytest.MonkeyPatch.context() as patch:
        log = Log(patch)
        simulate(scenario(policy="least_tokens", report_every_steps=every, rate_per_s=6, page_size=2), leap=leap)
    return [(now_ns, dict(log.known[:known])) for now_ns, known in log.decisions]


@pytest.mark.parametrize("every", [1, 3, 10])
def test_a_leap_leaves_out_no_report_that_somebody_reads(every: int) -> None:
    assert last_known(every, leap=True) == last_known(every, leap=False)


def test_a_leap_that_reports_its_end_only_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the last report of a leap may come too late for the next decision; the one before is missed."""

    def report_end(leaper: Leaper, reports: RouterReports, sent: Any, free_tokens: Any) -> None:
        reports.send_at(int(sent[-1]), load_report(leaper._scheduler))

    monkeypatch.setattr(Leaper, "_report_load", report_end)
    assert last_known(1, leap=True) != last_known(1, leap=False)


@pytest.mark.parametrize("every", [1, 4])
def test_a_report_comes_after_so_many_steps_and_when_idle(log: Log, every: int) -> None:
    run = simulate(scenario(policy="shortest_queue", report_every_steps=every, rate_per_s=8), leap=False)
    steps = np.bincount(np.asarray(run.records.steps["replica"]))
    assert len(log.sent) == sum(steps // every) + run.records.counters["idle_iterations"]
    last = {replica: report for _, replica, report in log.sent}
    assert sorted(report.steps for report in last.values()) == sorted(steps.tolist())
    assert all(report.running == report.waiting == report.used_tokens == 0 for report in last.values())
    assert sum(report.received for report in last.values()) == 60


def uses_what_has_come(log: Log, every: int) -> None:
    run = simulate(scenario(policy="least_tokens", report_every_steps=every), leap=False)
    assert [log.choices[rid] for rid in run.records.requests["id"]] == list(run.records.requests["replica"])
    assert len(log.decisions) == 60
    for now_ns, known in log.decisions:
        came = [(replica, report.steps) for when_ns, replica, report in log.sent if when_ns + REPORT_NS <= now_ns]
        assert sorted(came) == sorted((replica, report.steps) for replica, report in log.known[:known])


@pytest.mark.parametrize("every", [1, 7])
def test_a_decision_uses_the_reports_that_have_come(log: Log, every: int) -> None:
    uses_what_has_come(log, every)


def test_a_router_that_hears_at_once_is_found(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: a loop runs ahead of the clock, and what it tells is known before it is sent."""
    tell = Router.tell
    monkeypatch.setattr(Router, "tell", lambda self, when_ns, replica, what: tell(self, 0, replica, what))
    with pytest.raises(AssertionError):
        uses_what_has_come(log, 1)


def test_who_hears_the_ends_needs_no_reports_to_count() -> None:
    chosen = [
        list(
            simulate(scenario(policy="shortest_queue", hears_ends=True, report_every_steps=every)).records.requests[
                "replica"
            ]
        )
        for every in (1, 100)
    ]
    assert chosen[0] == chosen[1]
    assert chosen[0] != list(
        simulate(scenario(policy="shortest_queue", report_every_steps=100)).records.requests["replica"]
    )


@pytest.mark.parametrize("policy", ["round_robin", "random"])
def test_nobody_reports_to_who_does_not_look(log: Log, policy: str) -> None:
    simulate(scenario(policy=policy))
    assert log.sent == [] and len(log.choices) == 60


def test_one_engine_has_no_router(log: Log) -> None:
    found = [simulate(scenario(dp=1, policy=policy)) for policy in ("round_robin", "cache_aware")]
    assert log.sent == [] and log.choices == {}
    assert differences(*found) == []


def test_replicas_of_several_stages() -> None:
    run = simulate(scenario(dp=2, policy="shortest_queue", parallel={"dp": 2, "pp": 2}), checks="full")
    assert outcome(run) == outcome(simulate(scenario(dp=1)))


def test_on_the_wall_clock() -> None:
    run = execute(scenario(dp=2, count=12, policy="shortest_queue"), paced=True)
    assert outcome(run) == outcome(simulate(scenario(dp=1, count=12)))
    assert len(np.unique(run.records.requests["replica"])) == 2


def test_the_policy_of_the_guide(tmp_path: Path, log: Log) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    (snippet,) = [part for part in re.findall(r"```python\n(.+?)```", guide, re.DOTALL) if "replicas" in part]
    (tmp_path / "guide.py").write_text(snippet, encoding="utf-8")
    run = simulate(scenario(policy=f"{tmp_path / 'guide.py'}:FewestTokensOfTheShortest"))
    assert outcome(run) == outcome(simulate(scenario(dp=1)))
    assert log.sent, "a policy of one's own has reports"


def test_a_policy_that_fails_names_its_line(tmp_path: Path) -> None:
    text = "class Own:\n    def choose(self, request, replicas):\n        return 1 // (len(replicas) - 3)\n"
    (tmp_path / "own.py").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="ZeroDivisionError") as refused:
        simulate(scenario(policy=f"{tmp_path / 'own.py'}:Own"))
    assert "own.py:3" in refused.value.where


def test_arrivals_tied_to_iterations_are_refused() -> None:
    tied = scenario(dp=2).model_dump()
    tied["workload"]["arrivals"] = {"kind": "at_iteration", "every": 3}
    with pytest.raises(InputError, match="iteration") as refused:
        simulate(Scenario(**tied))
    assert refused.value.where == "workload.arrivals"
