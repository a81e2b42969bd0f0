"""Several engines: the router in front of them, and the links between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from testbed.deployment.build import Engine
from testbed.messages import Message
from testbed.routing.controller import Controller
from testbed.routing.pairs import PairRouter
from testbed.routing.policies import build_policy
from testbed.runtime.links import DrawnFaults, Links, LinkSpec
from testbed.runtime.pairs import PairedUsers, PairFront
from testbed.runtime.router import RoutedUsers, Router, RouterReports
from testbed.runtime.users import Timeline, Users, WorkloadUsers
from testbed.scenario.errors import InputError
from testbed.scenario.workload import AtIteration

Front = Router | PairFront


def build_front(
    engines: Sequence[Engine],
    timeline: Timeline,
    users: WorkloadUsers,
    at_rest: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Front | None:
    """Who spreads requests over a scenario's engines; None in front of one. ``at_rest``: see Router. Raises InputError
    for a policy that cannot be built, and for arrivals that no router can know of."""
    scenario = engines[0].scenario
    fronts = [engine for engine in engines if not engine.place.stage]
    if len(fronts) == 1:
        return None
    if isinstance(scenario.workload.arrivals, AtIteration):
        raise InputError(
            f"{len(fronts)} engines have loops of their own, and no iteration is that of all",
            where="workload.arrivals",
            remedy="let requests arrive by time, or use one engine",
        )
    if scenario.disaggregation is not None:
        names: dict[str, list[str]] = {"prefill": [], "decode": []}
        for engine in engines:
            if not engine.place.stage:
                names[engine.place.role].append(engine.place.engine)
        pairs = PairRouter(names["prefill"], names["decode"], scenario.seed)
        return PairFront(pairs, [engine.place.engine for engine in fronts], timeline, users)
    routing, vocab_size = scenario.routing, engines[0].model.vocab
    policy = build_policy(routing, seed=scenario.seed, vocab_size=vocab_size, base_dir=Path.cwd())
    return Router(Controller(len(fronts), policy, hears_ends=routing.hears_ends), timeline.now_ns, at_rest)


def open_inboxes(
    engines: Sequence[Engine],
    inboxes: Sequence[Callable[[Message], None]],
    users: WorkloadUsers,
    front: Front | None,
) -> None:
    """Let the users reach the engines: each by its first stage, through ``front`` where there is one. ``inboxes``: of
    every engine's loop."""
    firsts = [inbox for engine, inbox in zip(engines, inboxes, strict=True) if not engine.place.stage]
    users.submit = firsts[0]
    if front is not None:
        front.inboxes, users.submit = firsts, front.submit


def users_of(engine: Engine, users: WorkloadUsers, front: Front | None) -> Users | None:
    """Whom the loop of ``engine`` answers: nobody behind the first stage of a pipeline."""
    if engine.place.stage:
        return None
    if isinstance(front, PairFront):
        return PairedUsers(front, engine.place.engine)
    return users if front is None else RoutedUsers(front, engine.place.replica, users)


def reports_of(engine: Engine, front: Front | None, now_ns: Callable[[], int]) -> RouterReports | None:
    """Where the loop of ``engine``, whose time is ``now_ns``, reports its load: None where nobody wants to know."""
    if not isinstance(front, Router) or engine.place.stage:
        return None
    routing = engine.scenario.routing
    if not routing.reads_loads:
        return None
    return RouterReports(front, engine.place.replica, routing.report_every_steps, now_ns)


def build_links(engines: Sequence[Engine], timeline: Timeline) -> Links | None:
    """The links between prefill and decode engines; None where no keys and values are sent. Raises InputError where
    nobody says how fast they are."""
    scenario = engines[0].scenario
    if scenario.disaggregation is None:
        return None
    link = scenario.disaggregation.link
    faults = DrawnFaults(
        scenario.seed,
        loss=link.loss,
        duplicate=link.duplicate,
        corrupt=link.corrupt,
        jitter_ns=int(link.jitter_us * 1e3),
    )
    spec = LinkSpec(_gb_per_s(engines[0]), int(link.latency_us * 1e3), link.shared_gb_per_s)
    recorders = {engine.place.adapter: engine.recorder for engine in engines}
    return Links(timeline, spec, faults, lambda to, begin_ns, end_ns: recorders[to].received(begin_ns, end_ns))


def _gb_per_s(engine: Engine) -> float:
    parts, where = engine.scenario.disaggregation, "disaggregation.link.gb_per_s"
    assert parts is not None
    if parts.link.gb_per_s is not None:
        return parts.link.gb_per_s
    if engine.device is None:
        message = "a device of constant times has no network that a link would be as fast as"
        raise InputError(message, where=where, remedy="give disaggregation: {link: {gb_per_s: 50}}")
    return engine.device.network(where) * engine.scenario.engine.parallel.tp
