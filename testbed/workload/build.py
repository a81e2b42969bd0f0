"""From the ``workload:`` part of a scenario to a workload."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, repeat
from pathlib import Path

import numpy as np

from testbed.scenario.errors import InputError
from testbed.scenario.workload import (
    AllAtOnce,
    Arrivals,
    AtIteration,
    ClosedLoop,
    IndependentLengths,
    TraceArrivals,
    WorkloadConfig,
)
from testbed.workload.arrivals import arrival_times
from testbed.workload.base import Workload
from testbed.workload.contents import Contents, SessionRequests, SingleRequests, turns_per_session
from testbed.workload.draw import whole_tokens
from testbed.workload.lengths import length_draws, quantiles_of
from testbed.workload.prompts import SharedPrefixes
from testbed.workload.replay import RowRequests, TraceReplay, TraceWindow
from testbed.workload.sending import ClosedLoopUsers, OpenLoop
from testbed.workload.terms import Terms
from testbed.workload.traces.rows import SECOND_NS


def build_workload(
    config: WorkloadConfig,
    *,
    seed: int,
    context_length: int,
    vocab_size: int,
    base_dir: Path,
    bound_by: str = "engine.context_length",
) -> Workload:
    """The workload that a scenario describes.

    ``context_length``: tokens of prompt and output together that the engine takes; ``bound_by``: the field that this
    follows from; ``base_dir``: where relative paths start. Files are read once here, so that what is wrong in them is
    said before the run. Raises InputError.
    """
    terms = Terms(config, context_length, bound_by)
    until_ns = None if config.duration_s is None else round(config.duration_s * SECOND_NS)
    if config.requests is None:
        contents, available = _drawn(config, terms, seed, vocab_size, base_dir)
    else:
        window = TraceWindow(
            config.requests, terms=terms, seed=seed, rate_scale=config.rate_scale, limit=config.count, base_dir=base_dir
        )
        if config.arrivals is None:
            if not window.file.has_arrivals:
                raise InputError(
                    f"{window.path.name} has lengths only",
                    where="workload.requests",
                    remedy="say when they come, e.g. arrivals: {kind: poisson, rate_per_s: 2}",
                )
            return TraceReplay(window, terms, seed=seed, vocab_size=vocab_size, until_ns=until_ns)
        if window.scan.sessions:
            raise InputError(
                f"{window.path.name} has sessions, whose turns come when the turn before has ended",
                where="workload.arrivals",
                remedy="leave arrivals out: the trace has its own",
            )
        contents, available = RowRequests(window, terms, seed), window.scan.rows
    return _sent(config, contents, available, until_ns, seed, base_dir)


def _drawn(
    config: WorkloadConfig, terms: Terms, seed: int, vocab_size: int, base_dir: Path
) -> tuple[Contents, int | None]:
    """Contents without end; None for how many there are."""
    assert config.lengths is not None  # the schema sees to it
    if isinstance(config.lengths, IndependentLengths):
        _check_smallest(config.lengths, terms, base_dir)
    prefixes = SharedPrefixes(config.prefix, seed, base_dir) if config.prefix else None
    if config.sessions is not None:
        return SessionRequests(config.sessions, config.lengths, prefixes, terms, seed, vocab_size, base_dir), None
    return SingleRequests(length_draws(config.lengths, seed, base_dir), prefixes, terms, seed), None


def _check_smallest(lengths: IndependentLengths, terms: Terms, base_dir: Path) -> None:
    """Raises InputError when not even the shortest prompt with the shortest output fits the context."""
    shortest = np.array([2.0**-53])
    prompt = quantiles_of(lengths.prompt_tokens, base_dir, "prompt_tokens", whole=True)
    output = quantiles_of(lengths.output_tokens, base_dir, "output_tokens", whole=True)
    smallest = [int(whole_tokens(quantiles(shortest))[0]) for quantiles in (prompt, output)]
    if not terms.fits(*smallest):
        raise InputError(
            f"{smallest[0]} + {smallest[1]} tokens exceed {terms.limit}",
            where="workload.lengths",
            remedy=f"shorter lengths, or a larger {terms.bound_by}",
        )


def _sent(
    config: WorkloadConfig, contents: Contents, available: int | None, until_ns: int | None, seed: int, base_dir: Path
) -> Workload:
    """Contents sent as ``arrivals`` say."""
    law = config.arrivals
    assert law is not None  # the schema sees to it
    limits = [each for each in (config.count, available) if each is not None]
    if isinstance(law, ClosedLoop):
        _check_end(law, limits, until_ns)
        return ClosedLoopUsers(
            contents,
            quantiles_of(law.think_s, base_dir),
            users=law.users,
            ramp_ns=round(law.ramp_s * SECOND_NS),
            seed=seed,
            count=config.count,
            until_ns=until_ns,
            expected=_expected(config, limits),
        )
    arrivals, size = _arrivals(law, config, seed, base_dir)
    limits += [] if size is None else [size]
    _check_end(law, limits, until_ns)
    return OpenLoop(contents, arrivals, count=config.count, until_ns=until_ns, expected=_expected(config, limits))


def _arrivals(
    law: Arrivals, config: WorkloadConfig, seed: int, base_dir: Path
) -> tuple[Iterator[tuple[int, int]], int | None]:
    """(arrival in ns, iteration or -1), and how many there are where they end."""
    if isinstance(law, AtIteration):
        if law.iterations is not None:
            return zip(repeat(0), law.iterations), len(law.iterations)
        assert law.every is not None
        every, batch = law.every, law.batch
        return ((0, index // batch * every) for index in count()), None
    if isinstance(law, TraceArrivals):
        window = TraceWindow(
            law, terms=None, seed=seed, rate_scale=config.rate_scale, limit=config.count, base_dir=base_dir
        )
        if not window.file.has_arrivals:
            raise InputError(
                f"{window.path.name} has lengths only",
                where="workload.arrivals",
                remedy="name a trace with arrival times",
            )
        return ((row.arrival_ns, -1) for row in window), window.scan.rows
    assert not isinstance(law, ClosedLoop)
    return ((arrival_ns, -1) for arrival_ns in arrival_times(law, seed, config.rate_scale)), None


def _check_end(law: Arrivals, limits: list[int], until_ns: int | None) -> None:
    timeless = isinstance(law, AllAtOnce | AtIteration)
    if not limits and (until_ns is None or timeless):
        remedy = "give count" if timeless else "give count or duration_s"
        raise InputError("the workload has no end", where="workload", remedy=remedy)


def _expected(config: WorkloadConfig, limits: list[int]) -> int | None:
    """How many requests there will be, where neither time nor chance decides."""
    turns = turns_per_session(config.sessions) if config.sessions else 1
    if not limits or turns is None or config.duration_s is not None:
        return None
    return min(limits) * turns
