"""Recorded runs of every kind, for replay: small, and between them everything happens that can happen to a request."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from testbed import Run, execute, load_scenario, simulate
from testbed.api import check_real, execute_on
from testbed.engine.device import open_device
from testbed.engine.models.create import Sizes, create_model
from testbed.messages import (
    AbortRequest,
    BatchGenerateRequest,
    FlushCache,
    GenerateRequest,
    GetInternalState,
    Message,
    SetInternalState,
    SlowDown,
    Timer,
    TokenPrompt,
)
from testbed.metrics.journal import Setting
from testbed.sampling import SamplingParams
from testbed.scenario.load import resolve
from testbed.scenario.schema import ConstantDevice, EngineConfig, Scenario
from testbed.scheduler.decisions import Decision, read_decisions
from testbed.workload.base import TimedRequest
from tests.engine.machine import runs_on, tiny_device
from tests.properties.world import VOCABULARY, Job, Outcome, burst, engine, run

QUICK = ConstantDevice(prefill_ns=20_000, decode_ns=10_000)
OWN = Path(__file__).parents[1] / "laws" / "own" / "alternate.py"


class Case(NamedTuple):
    """A run to be made, by name."""

    name: str
    make: Callable[[], Run]


# -- runs of scenarios ----------------------------------------------------------------------------


def scenario(engine: Mapping[str, Any], loop: str = "overlap", **fields: Any) -> Scenario:
    """Requests of 150 tokens on average, faster than they are served."""
    workload = {
        "arrivals": {"kind": "poisson", "rate_per_s": 250},
        "lengths": {
            "prompt_tokens": {"kind": "uniform", "low": 20, "high": 280},
            "output_tokens": {"kind": "uniform", "low": 1, "high": 90},
        },
        "count": 40,
        **fields.pop("workload", {}),
    }
    whole = {"model": "qwen3-0.6b", "host": "sglang-0.5", **fields}
    return load_scenario({**whole, "engine": {**engine, "loop": loop}, "workload": workload}).scenario


def simulated(engine: Mapping[str, Any], loop: str = "overlap", **fields: Any) -> Run:
    """A run of ``scenario`` in virtual time."""
    return simulate(scenario(engine, loop, **fields))


TIGHT = {"kv_tokens": 1500, "init_new_token_ratio": 0.05}
PREFIXES = {"prefix": {"groups": 4, "prefix_tokens": 100, "share": 0.8}}
SESSIONS = {"sessions": {"turns": 4, "think_s": 0.1, "user_tokens": 30, "system_tokens": 60}, "count": 12}
EARLY = {"max_new_tokens": 200}
CLOSED = {"arrivals": {"kind": "closed_loop", "users": 6, "think_s": 0.05}}

SIMULATED = [
    Case("simulated, normal", partial(simulated, {}, "normal")),
    Case("simulated, overlap, leaps", partial(simulated, {}, "overlap")),
    Case("simulated, chunks", partial(simulated, {"chunked_prefill_size": 64})),
    Case("simulated, mixed chunks", partial(simulated, {"batching": "mixed_chunk", "chunked_prefill_size": 48})),
    Case(
        "simulated, stall free",
        partial(
            simulated, {"batching": "stall_free", "chunked_prefill_size": 64, "max_running_requests": 16}, "normal"
        ),
    ),
    Case("simulated, static", partial(simulated, {"batching": "static", "max_running_requests": 4})),
    Case("simulated, retraction", partial(simulated, TIGHT)),
    Case("simulated, retraction, pages of 16", partial(simulated, {**TIGHT, "page_size": 16}, "normal")),
    Case("simulated, as SGLang", partial(simulated, {**TIGHT, "preset": "sglang-0.5.1"})),
    Case("simulated, as vLLM", partial(simulated, {"kv_tokens": 1504, "preset": "vllm-v1"})),
    Case("simulated, prefixes, lpm", partial(simulated, {**TIGHT, "policy": "lpm"}, workload=PREFIXES)),
    Case("simulated, prefixes, dfs_weight", partial(simulated, {**TIGHT, "policy": "dfs_weight"}, workload=PREFIXES)),
    Case("simulated, lof, no cache", partial(simulated, {**TIGHT, "policy": "lof", "prefix_cache": "none"})),
    Case("simulated, random order, seeded", partial(simulated, {**TIGHT, "policy": "random"}, seed=7)),
    Case("simulated, sessions", partial(simulated, {"kv_tokens": 2000, "eviction": "lfu"}, workload=SESSIONS)),
    Case("simulated, early ends", partial(simulated, TIGHT, workload=EARLY)),
    Case("simulated, closed loop", partial(simulated, {"max_running_requests": 4}, "normal", workload=CLOSED)),
]


def paced(engine: Mapping[str, Any], loop: str, **fields: Any) -> Run:
    """The cost model takes its time for real, but takes little."""
    device = {"constant": {"prefill_ns": 40_000, "decode_ns": 20_000}}
    workload = {"arrivals": {"kind": "poisson", "rate_per_s": 1500}, **fields.pop("workload", {})}
    chosen = {"kv_tokens": 1500, "init_new_token_ratio": 0.05, **engine}
    return execute(scenario(chosen, loop, device=device, host="none", workload=workload, **fields), paced=True)


def interrupted(loop: str, prefill_ns: int = 40_000, after: int = 5) -> Run:
    """Somebody presses Ctrl-C in the middle, ``after`` requests have ended: others wait, run and are in flight."""
    told: list[int] = []

    def stop(now_ns: int, ended: int, *_: object) -> None:
        if ended >= after and not told:
            told.append(now_ns)
            signal.raise_signal(signal.SIGINT)

    device = {"constant": {"prefill_ns": prefill_ns, "decode_ns": 20_000}}
    chosen = scenario(TIGHT, loop, device=device, host="none", workload={"arrivals": {"kind": "all_at_once"}})
    with mock.patch("testbed.api.PROGRESS_EVERY_NS", 1):
        found = execute(chosen, paced=True, progress=stop)
    assert found.meta["interrupted"]
    return found


PACED = [
    Case("paced, normal, retraction", partial(paced, {}, "normal")),
    Case(
        "paced, overlap, mixed chunks",
        partial(paced, {"batching": "mixed_chunk", "chunked_prefill_size": 48}, "overlap"),
    ),
    Case("paced, overlap, sessions, early ends", partial(paced, {}, "overlap", workload={**SESSIONS, **EARLY})),
    Case("paced, overlap, a slow host", partial(paced, {"kv_tokens": 5000}, "overlap", host_inject="sglang-0.5")),
    Case("paced, normal, interrupted", partial(interrupted, "normal")),
    Case("paced, overlap, interrupted", partial(interrupted, "overlap")),
]


# -- runs of the small world of tests.properties ------------------------------------------------------


def as_run(outcome: Outcome, kv_tokens: int = 4096, seed: int = 0) -> Run:
    """A run with the records of ``outcome``, as ``testbed`` would have saved it."""
    scheduler = outcome.scheduler
    assert scheduler.recorder.journal is outcome.records.journal
    scheduler.recorder.journal.setting = Setting(
        loop=scheduler.config.loop,
        vocab_size=VOCABULARY,
        kv_tokens=kv_tokens,
        context_length=scheduler.context_length,
        seed=seed,
    )
    whole = Scenario(
        model="qwen3-0.6b",
        engine=EngineConfig(**{**scheduler.config.model_dump(), "kv_tokens": kv_tokens}),
        workload={"arrivals": {"kind": "all_at_once"}, "lengths": {"prompt_tokens": 1, "output_tokens": 1}, "count": 1},
        seed=seed,
    )
    steps = outcome.records.steps
    steps |= {name: np.zeros(len(steps["step"])) for name in ("flops", "bytes")}  # nobody priced them
    return Run(resolve(whole), outcome.records, {"label": "simulated"})


def everything(paced: bool = False, kv_tokens: int = 110, **fields: Any) -> Run:
    """Shared prefixes, priorities, chunks, retraction, eviction, aborts in many states, early ends."""
    shared = [
        Job(f"s{i}", (("stem", 20), (f"own {i}", 5 + i)), 4 + i, iteration=3 * i, priority=i % 3) for i in range(8)
    ]
    early = [Job(f"e{i}", ((f"e {i}", 9),), 3 + i, 20, iteration=4 + i) for i in range(4)]
    pressed = [job._replace(iteration=2 * i) for i, job in enumerate(burst(6, prompt=15, outputs=30))]
    script: dict[int, list[Message]] = {
        0: [GetInternalState(), AbortRequest("nobody")],
        3: [AbortRequest("r1"), AbortRequest("s1")],
        7: [AbortRequest("s2"), AbortRequest("r3")],
        19: [AbortRequest("r5")],
        60: [FlushCache()],
    }
    chosen = engine(chunked_prefill_size=16, clip_max_new_tokens=1, **fields)
    jobs = [*shared, *early, *pressed]
    return as_run(
        run(chosen, jobs, kv_tokens=kv_tokens, device=QUICK, script=script, paced=paced, prove=False), kv_tokens
    )


def controls(paced: bool = False) -> Run:
    """Every message there is: settings changed, sleeps, timers, several requests in one message, all aborted."""
    more = BatchGenerateRequest(tuple(GenerateRequest(f"m{i}", TokenPrompt(np.arange(4 + i)), 5) for i in range(3)))
    script: dict[int, list[Message]] = {
        1: [SetInternalState({"max_running_requests": 2}), Timer("woken")],
        2: [SlowDown(30_000)],
        5: [SetInternalState({"new_token_ratio": 0.3, "max_running_requests": 5}), SlowDown(0)],
        9: [SetInternalState({"nonsense": 1}), GetInternalState(), FlushCache()],
        12: [AbortRequest(abort_all=True)],
        13: [more],
    }
    jobs = [job._replace(iteration=0 if i < 7 else 40) for i, job in enumerate(burst(9, prompt=12, outputs=25))]
    jobs.append(Job("giant", (("g", 5000),), 3, iteration=14))

    def expect(_: object, runtime: Any) -> None:  # requests of a script are sent by nobody who waits for them
        for request in more.requests:
            runtime.traffic.sent[request.rid] = (0, "", "")
        runtime.traffic.open += len(more.requests)

    outcome = run(engine(), jobs, device=QUICK, script=script, paced=paced, prove=False, before=expect)
    return as_run(outcome)


WORLDS = [
    Case("simulated, aborts, normal", partial(everything, loop="normal", priority=True)),
    Case("simulated, aborts, overlap", partial(everything, loop="overlap", priority=True, policy="lpm")),
    Case("simulated, aborts, pages of 4", partial(everything, loop="overlap", page_size=4, batching="stall_free")),
    Case(
        "simulated, aborts, late frees", partial(everything, loop="overlap", rules={"over_allocated": "free_at_result"})
    ),
    Case("simulated, every control message", controls),
    Case("paced, aborts, overlap", partial(everything, True, loop="overlap", priority=True)),
    Case("paced, every control message", partial(controls, True)),
]


# -- runs on a real device: the CPU of this machine ---------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request of a real client: tokens are drawn, it stops at many of them, and wants log-probabilities."""

    number: int
    arrival_ns: int = 0

    @property
    def iteration(self) -> int:
        return 2 * self.number

    def timed(self) -> TimedRequest:
        i = self.number
        stops = tuple(range(i, VOCABULARY, 12)) if i % 2 else ()
        wants = i % 3 == 0
        message = GenerateRequest(
            f"r{i}",
            TokenPrompt(np.arange(7, 15 + 3 * i)),
            40,
            sampling=SamplingParams(temperature=1.0, stop_token_ids=stops, seed=i),
            return_logprob=wants,
            top_logprobs=i if wants else 0,
            logprob_start=i % 5 if wants else -1,
        )
        return TimedRequest(0, message, 40, iteration=self.iteration)


def drawn(loop: str) -> Run:
    """Sampled tokens, stop ids, log-probabilities; the pool is too small for all."""
    config = engine(loop=loop, chunked_prefill_size=16, clip_max_new_tokens=1)
    jobs: list[Any] = [Asked(i) for i in range(10)]
    torch.set_num_threads(1)
    with tiny_device(160) as device:
        outcome = run(config, jobs, kv_tokens=160, device_of=runs_on(device, forced=False), prove=False)
    return as_run(outcome, 160)


REAL = """\
device: h100-sxm
engine: {kv_tokens: 400, max_running_requests: 8, context_length: 256, init_new_token_ratio: 0.05, loop: LOOP}
workload:
  arrivals: {kind: poisson, rate_per_s: 200}
  lengths: {prompt_tokens: {kind: uniform, low: 5, high: 90}, output_tokens: {kind: uniform, low: 1, high: 40}}
  count: 20
"""


@contextmanager
def real_scenario(loop: str) -> Iterator[Scenario]:
    """A scenario whose model is a folder that is gone afterwards."""
    with TemporaryDirectory() as folder:
        create_model("llama-3.1-8b", Path(folder) / "tiny", Sizes(layers=1, hidden=32))
        file = Path(folder) / "one.yaml"
        file.write_text(f"model: {folder}/tiny\n{REAL.replace('LOOP', loop)}", encoding="utf-8")
        yield load_scenario(file).scenario


def real(loop: str) -> Run:
    """A model of random weights, greedy."""
    torch.set_num_threads(1)
    with real_scenario(loop) as chosen, open_device(check_real(chosen), in_process=True) as device:
        return execute_on(device, chosen)


def real_process(loop: str) -> Run:
    """The same in a process of its own, as ``testbed run`` has it."""
    with real_scenario(loop) as chosen:
        return execute(chosen)


ON_THE_CPU = [
    Case("real, normal", partial(real, "normal")),
    Case("real, overlap", partial(real, "overlap")),
    Case("real, normal, drawn tokens", partial(drawn, "normal")),
    Case("real, overlap, drawn tokens", partial(drawn, "overlap")),
]
IN_A_PROCESS = Case("real, overlap, a process of its own", partial(real_process, "overlap"))

CASES = [*SIMULATED, *PACED, *WORLDS, *ON_THE_CPU]


def happened(run: Run) -> set[str]:
    """What of the unusual happened in a run."""
    requests, steps, journal = run.records.requests, run.records.steps, run.records.journal
    assert journal is not None
    decisions = list(read_decisions(run.records.decisions))
    found = {
        "retraction": np.asarray(requests["retractions"]).sum() > 0,
        "abort": "abort" in requests["finish_reason"],
        "stop": bool(journal.stopped),
        "chunking": _is_cut(decisions),
        "cache": np.asarray(requests["cached_tokens"]).sum() > 0,
        "eviction": np.asarray(steps["evicted_tokens"]).sum() > 0,
        "leap": run.records.counters.get("steps_leapt", 0) > 0,
        "log-probabilities": bool(journal.logprobs),
        "interruption": bool(run.meta.get("interrupted")),
        "refusal": "error" in requests["finish_reason"],
    }
    return {name for name, it_did in found.items() if it_did}


def _is_cut(decisions: Sequence[Decision]) -> bool:
    """Whether a prefill goes on behind an earlier one of the same request, which has not decoded yet."""
    ends: dict[int, int] = {}
    for decision in decisions:
        for request, prefix, new_tokens in decision.prefills:
            if prefix and ends.get(request) == prefix:
                return True
            ends[request] = prefix + new_tokens
        for request in decision.decodes:
            ends.pop(request, None)
    return False
