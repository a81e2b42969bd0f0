"""Replay a run: its messages, stamps and step results go through scheduler and loop again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from testbed.deployment import build_loop, build_scheduler
from testbed.loops.overlap import event_loop_overlap
from testbed.loops.overlap_thread import event_loop_overlap_thread
from testbed.metrics.run import Run
from testbed.runtime.replay import Replayed, replay_loop
from testbed.scenario.errors import InputError
from testbed.scenario.plugins import is_plugin, own_faults
from testbed.scenario.schema import EngineConfig, Scenario
from testbed.scheduler.decisions import HEADER

MOST_PAGES = 1 << 28
MOST_REQUESTS = 1 << 20
"""Memory is reserved for as many at once; a run that claims more is not replayed."""


def replay(run: Run | Path | str, *, until_step: int | None = None, own_code: bool = False) -> Replayed:
    """Drive scheduler and loop of this program through a run, or a run folder, and compare every decision.

    ``until_step``: stop once so many steps are launched. ``own_code``: the run may name loops, strategies and policies
    of its own, whose code is imported; a run from somebody else should not. Raises InputError for a run without a
    journal, a damaged one, or one that names own code unasked.
    """
    chosen = run if isinstance(run, Run) else Run.load(run)
    where = str(chosen.folder) if chosen.folder is not None else "run"
    journal = chosen.records.journal
    if journal is None or journal.setting is None:
        remedy = "run the scenario again; a run of several loops keeps none"
        raise InputError("the run has no journal to replay", where=where, remedy=remedy)
    if chosen.records.decisions[: len(HEADER)] != HEADER:
        raise InputError("its decision log is no log of this version", where=where, remedy="run the scenario again")
    config = _engine_of(chosen, where).model_copy(update={"loop": journal.setting.loop})
    if journal.setting.kv_tokens // config.page_size > MOST_PAGES or config.max_running_requests > MOST_REQUESTS:
        remedy = f"at most {MOST_PAGES:,} pages and {MOST_REQUESTS:,} requests at once: make it with engine.kv_tokens"
        raise InputError("the run claims more memory than a replay takes", where=where, remedy=remedy)
    for field, name in _own_parts(config):
        if not own_code:
            remedy = "read that code; then replay with --own-code"
            raise InputError(f"the run was made with code of its own: {name}", where=f"engine.{field}", remedy=remedy)
    _, loop = build_loop(config)
    if loop is event_loop_overlap_thread:
        loop = event_loop_overlap  # which decides the same: in a replay no time passes, and nobody launches
    with own_faults():
        return replay_loop(loop, build_scheduler(config, journal.setting), journal, chosen.records, until_step)


def _engine_of(run: Run, where: str) -> EngineConfig:
    try:
        return Scenario.model_validate(run.scenario).engine
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        remedy = "replay it with the version that made it"
        raise InputError(
            f"the run's scenario is not valid here: {first['msg']}", where=f"{where}: {field}", remedy=remedy
        ) from error


def _own_parts(config: EngineConfig) -> Iterator[tuple[str, str]]:
    """Fields of the engine that name somebody's own code."""
    for field in ("loop", "batching", "policy"):
        name = getattr(config, field)
        if is_plugin(name):
            yield field, name
