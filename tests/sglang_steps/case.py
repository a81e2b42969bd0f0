"""One recorded case of SGLang's scheduler, and the same workload through ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, BatchShape, StepCost
from testbed.loops.base import LoopContext
from testbed.loops.select import find_loop
from testbed.messages import GenerateRequest, Prompt, Segment
from testbed.metrics.recorder import Recorder
from testbed.runtime.modelled import Deadlock
from testbed.runtime.oracle import Oracle
from testbed.runtime.traffic import Traffic
from testbed.runtime.users import WorkloadUsers
from testbed.runtime.virtual import VirtualRuntime, run_to_the_end
from testbed.runtime.world import World
from testbed.scenario.schema import EngineConfig, Rules
from testbed.scheduler.scheduler import Scheduler
from testbed.tokens import oracle_key, stream_key
from testbed.workload.base import TimedRequest

VOCABULARY = 2**31 - 1  # so large that different streams differ from their first token on, as in the recordings

SGLANG_RULES = Rules(
    admission="when_batch_shrinks",
    retract_until="20_tokens_per_request",
    retracted_reserve="whole",
    chunk_align="page_plus_one",
    over_allocated="free_at_result",
    ignore_eos_admission=True,
    prefill_budget="always",
    evict_amount="whole_need",
    can_stall=True,
)


class OneNanosecond:
    """A device that takes 1 ns a step, so that time moves."""

    def price(self, shape: BatchShape) -> StepCost:
        return StepCost(1, 0, True)

    def price_decode(self, rows: int, context_tokens: int, context_max: int) -> StepCost:
        return StepCost(1, 0, True)


class NoHost:
    def price(self, *sizes: int) -> int:
        return 0

    def launch_ns(self, kernels: int, graph: bool) -> int:
        return 0


class CaseWorkload:
    """Requests delivered before given loop iterations."""

    def __init__(self, requests: list[TimedRequest]) -> None:
        self._requests = requests

    def start(self) -> Iterator[TimedRequest]:
        return iter(self._requests)

    def on_finish(self, rid: str, now_ns: int, output_ids: NDArray[np.int32]) -> Sequence[TimedRequest]:
        return ()

    def expected_requests(self) -> int | None:
        return len(self._requests)

    def notes(self) -> list[str]:
        return []


def engine_config(config: dict[str, Any]) -> EngineConfig:
    extra = config.get("extra_server_args", {})
    return EngineConfig(
        preset="sglang-0.5.1",
        loop=config["loop"],
        batching="mixed_chunk" if config["enable_mixed_chunk"] else "prefill_first",
        policy=config["schedule_policy"].replace("-", "_"),
        priority=extra.get("enable_priority_scheduling", False),
        retract_to="back",
        chunked_prefill_size=config["chunked_prefill_size"],
        max_prefill_tokens=config["max_prefill_tokens"],
        max_running_requests=config["max_running_requests"],
        context_length=config["context_len"],
        kv_tokens=config["max_total_tokens"],
        prefix_cache="chunk" if config["disable_radix_cache"] else "radix",
        page_size=config["page_size"],
        schedule_conservativeness=config["schedule_conservativeness"],
        init_new_token_ratio=config["init_new_token_ratio"],
        min_new_token_ratio_factor=config["min_new_token_ratio_factor"],
        new_token_ratio_decay_steps=config["new_token_ratio_decay_steps"],
        clip_max_new_tokens=config["clip_max_new_tokens"],
        in_batch_check_threshold=config["in_batch_check_threshold"],
        in_batch_deprioritize_threshold=config["in_batch_deprioritize_threshold"],
        rules=SGLANG_RULES,
    )


def timed_requests(requests: list[dict[str, Any]]) -> list[TimedRequest]:
    timed = []
    for request in requests:
        segments = [
            Segment(stream_key("segment", where) if kind == "s" else oracle_key(0, f"r{where}"), 0, length)
            for kind, where, length in request["prompt"]
        ]
        message = GenerateRequest(
            rid=f"r{request['id']}",
            prompt=Prompt(segments),
            max_new_tokens=request["max_new_tokens"],
            ignore_eos=request["ignore_eos"],
            priority=request.get("extra", {}).get("priority"),
        )
        timed.append(TimedRequest(0, message, request["out_len"], iteration=request["arrive"]))
    return sorted(timed, key=lambda t: t.iteration)


@dataclass
class Replayed:
    """Our steps in the recordings' form."""

    steps: list[dict[str, Any]]
    deadlock: bool


def replay(path: Path) -> tuple[dict[str, Any], Replayed]:
    case = json.loads(path.read_text())
    config = engine_config(case["config"])
    recorder = Recorder()
    scheduler = Scheduler(
        config,
        kv_tokens=case["config"]["max_total_tokens"],
        context_length=case["config"]["context_len"],
        vocab_size=VOCABULARY,
        recorder=recorder,
        checks="full",
    )
    world, oracle = World(), Oracle(0, VOCABULARY, scheduler.memory.slots.count)
    users = WorkloadUsers(world, Traffic(CaseWorkload(timed_requests(case["requests"])), oracle))
    runtime = VirtualRuntime(
        world=world, users=users, cost_model=OneNanosecond(), host=NoHost(), recorder=recorder, oracle=oracle
    )
    steps: list[dict[str, Any]] = []
    decide = scheduler.get_next_batch_to_run

    def recording(now_ns: int) -> Batch | None:
        batch = decide(now_ns)
        steps.append(describe(runtime.iteration - 1, batch, scheduler))
        return batch

    scheduler.get_next_batch_to_run = recording  # type: ignore[method-assign]
    deadlock = False
    try:
        run_to_the_end(find_loop(config.loop)[1](LoopContext(scheduler, runtime)), runtime, users)
    except Deadlock:
        deadlock = True
    return case, Replayed(steps, deadlock)


def describe(iteration: int, batch: Batch | None, scheduler: Scheduler) -> dict[str, Any]:
    memory = scheduler.memory
    step: dict[str, Any] = {
        "it": iteration,
        "kind": "none" if batch is None else batch.mode.name.lower(),
        "new_token_ratio": scheduler.new_token_ratio,
        "available": memory.allocator.available_tokens + memory.cache.evictable_tokens,
    }
    if batch is not None:
        decodes = [request.rank for request in batch.decodes]
        step["reqs"] = [prefill.request.rank for prefill in batch.prefills] + decodes
        step["seq_lens"] = [p.prefix_tokens + p.new_tokens for p in batch.prefills] + batch.seq_lens.tolist()
        step["retracted"] = [request.rank for request in batch.retracted]
        if batch.prefills:
            step["prefix"] = [p.prefix_tokens for p in batch.prefills]
            step["extend"] = [p.new_tokens for p in batch.prefills]
    return step


def launched(case: dict[str, Any]) -> list[dict[str, Any]]:
    """SGLang's launched steps, normalised as the data's README says: empty iterations left out; in mixed steps the
    prefix and extend lists cut to the prefills."""
    steps = []
    for step in case["steps"]:
        if step["kind"] == "none":
            continue
        plain = {"it": step["it"], "kind": step["kind"], "new_token_ratio": step["new_token_ratio"]}
        plain["available"] = step["free"] + step["evictable"]
        plain["reqs"], plain["seq_lens"] = step["reqs"], step["seq_lens"]
        plain["retracted"] = step.get("retracted", [])
        if "prefix" in step:
            rows = len(step["reqs"]) - step["n_decode"]
            plain["prefix"], plain["extend"] = step["prefix"][:rows], step["extend"][:rows]
        steps.append(plain)
    return steps


def first_difference(case: dict[str, Any], ours: list[dict[str, Any]]) -> str | None:
    """The first launched step that differs, and in what; None when all are equal."""
    theirs = launched(case)
    mine = [step for step in ours if step["kind"] != "none"]
    for index, (one, other) in enumerate(zip(theirs, mine, strict=False)):
        for name in ("kind", "reqs", "prefix", "extend", "seq_lens", "retracted", "available"):
            if one.get(name) != other.get(name):
                return f"step {index} (it {one['it']}): {name}: SGLang {one.get(name)}, ours {other.get(name)}"
        if abs(one["new_token_ratio"] - other["new_token_ratio"]) > 1e-9:
            return f"step {index}: new_token_ratio: SGLang {one['new_token_ratio']}, ours {other['new_token_ratio']}"
    if len(theirs) != len(mine):
        return f"SGLang launched {len(theirs)} steps, ours {len(mine)}"
    return None
