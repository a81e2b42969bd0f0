"""Several replicas: the router in front of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from testbed.deployment.build import Engine
from testbed.routing.controller import Controller
from testbed.routing.policies import build_policy
from testbed.runtime.router import RoutedUsers, Router, RouterReports
from testbed.runtime.users import Users, WorkloadUsers
from testbed.scenario.errors import InputError
from testbed.scenario.workload import AtIteration


def build_router(
    engines: Sequence[Engine],
    now_ns: Callable[[], int],
    at_rest: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Router | None:
    """The router that a scenario's replicas have (its arguments: see Router); None in front of one. Raises InputError
    for a policy that cannot be built, and for arrivals that no router can know of."""
    scenario, replicas = engines[0].scenario, engines[-1].place.replica + 1
    if replicas == 1:
        return None
    if isinstance(scenario.workload.arrivals, AtIteration):
        raise InputError(
            f"{replicas} replicas have loops of their own, and no iteration is that of all",
            where="workload.arrivals",
            remedy="let requests arrive by time, or use parallel: {dp: 1}",
        )
    routing, vocab_size = scenario.routing, engines[0].model.vocab
    policy = build_policy(routing, seed=scenario.seed, vocab_size=vocab_size, base_dir=Path.cwd())
    return Router(Controller(replicas, policy, hears_ends=routing.hears_ends), now_ns, at_rest)


def users_of(engine: Engine, users: WorkloadUsers, router: Router | None) -> Users | None:
    """Whom the loop of ``engine`` answers: nobody behind the first stage of a pipeline."""
    if engine.place.stage:
        return None
    return users if router is None else RoutedUsers(router, engine.place.replica, users)


def reports_of(engine: Engine, router: Router | None, now_ns: Callable[[], int]) -> RouterReports | None:
    """Where the loop of ``engine``, whose time is ``now_ns``, reports its load: None where nobody wants to know."""
    if router is None or engine.place.stage:
        return None
    routing = engine.scenario.routing
    if not routing.reads_loads:
        return None
    return RouterReports(router, engine.place.replica, routing.report_every_steps, now_ns)
