"""What no single field can know: settings that exclude each other, and settings that do not do what they seem to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from testbed.scenario.experts import Experts
from testbed.scenario.routing import Routing
from testbed.scenario.schema import EngineConfig, Scenario
from testbed.scenario.yaml_reader import FieldPath


class Problem(NamedTuple):
    """What is wrong with the field at ``path``, and what to write instead."""

    path: FieldPath
    message: str
    remedy: str


def find_problems(scenario: Scenario, written: Mapping[str, Any]) -> tuple[list[Problem], list[Problem]]:
    """Errors and warnings. ``written`` is the data as the user wrote it, completed by the engine preset."""
    engine = scenario.engine
    errors = [
        *_loop_conflicts(scenario),
        *_disaggregation_conflicts(scenario),
        *_engine_conflicts(engine),
        *_parallel_conflicts(engine),
        *_measure_conflicts(scenario),
    ]
    return errors, list(_without_effect(scenario, written))


def _loop_conflicts(scenario: Scenario) -> Iterator[Problem]:
    """Which loops go with how many stages (specification A.0)."""
    stages, loop = scenario.engine.parallel.pp, scenario.engine.loop
    if scenario.disaggregation is not None:
        return  # its engines have loops of their own
    if stages > 1 and loop in ("normal", "overlap", "overlap_thread", "overlap_suspended"):
        yield Problem(
            ("engine", "loop"),
            f"a pipeline of {stages} stages has loops of its own and excludes the {loop} loop",
            "use auto, pipeline or pipeline_async, or parallel: {pp: 1}",
        )
    if stages == 1 and loop in ("pipeline", "pipeline_async"):
        yield Problem(
            ("engine", "loop"),
            f"the {loop} loop is that of a pipeline, and there is one stage",
            "use parallel: {pp: 2} or more, or loop: auto, normal or overlap",
        )


def _disaggregation_conflicts(scenario: Scenario) -> Iterator[Problem]:
    engine, parts = scenario.engine, scenario.disaggregation
    if parts is None:
        return
    if engine.loop not in ("auto", "normal", "overlap"):
        message = f"the {engine.loop} loop is none of a prefill or a decode engine"
        yield Problem(("engine", "loop"), message, "use auto, normal or overlap, or leave disaggregation out")
    counted = (
        ("pp", "pipeline stages", "prefill_stages counts them"),
        ("dp", "replicas", "prefill and .decode count engines"),
    )
    for name, what, instead in counted:
        if (count := getattr(engine.parallel, name)) > 1:
            message = f"{count} {what} do not go with disaggregation"
            yield Problem(("engine", "parallel", name), message, f"use {name}: 1; disaggregation.{instead}")
    if engine.parallel.stage_layers is not None:
        message = "does not go with disaggregation, whose stages have as even layers as it goes"
        yield Problem(("engine", "parallel", "stage_layers"), message, "leave it out")
    if engine.batching != "prefill_first":
        message = f"batching {engine.batching} mixes what disaggregation keeps apart"
        yield Problem(("engine", "batching"), message, "use prefill_first, or leave disaggregation out")


def _engine_conflicts(engine: EngineConfig) -> Iterator[Problem]:
    chunk, page = engine.chunked_prefill_size, engine.page_size
    if chunk != -1 and chunk % page:
        below = chunk // page * page
        yield Problem(
            ("engine", "chunked_prefill_size"),
            f"{chunk} tokens are not a whole number of pages of {page} tokens (page_size)",
            f"use {below or page}{f' or {below + page}' if below else ''}, or a page_size that divides {chunk}",
        )
    if engine.batching in ("stall_free", "mixed_chunk") and chunk == -1:
        yield Problem(
            ("engine", "chunked_prefill_size"),
            f"batching {engine.batching} cuts prompts into chunks; -1 forbids that",
            "give the tokens of a step, for example 2048, or use batching: prefill_first",
        )
    if engine.batching == "stall_free" and 0 < chunk < engine.max_running_requests:
        yield Problem(
            ("engine", "max_running_requests"),
            f"{engine.max_running_requests} running requests need as many tokens a step; the budget"
            f" chunked_prefill_size is {chunk}",
            f"use max_running_requests: {chunk} or less, or a larger chunked_prefill_size",
        )
    if engine.kv_tokens is not None and engine.kv_tokens < page:
        message = f"{engine.kv_tokens} tokens are less than one page of {page} tokens (page_size)"
        yield Problem(("engine", "kv_tokens"), message, f"use {page} or more")
    if engine.rules.ignore_eos_admission and engine.rules.reserve == "none":
        yield Problem(
            ("engine", "rules", "ignore_eos_admission"),
            "SGLang's admission rule reserves memory; reserve: none (vLLM) does not",
            "use ignore_eos_admission: false, or reserve: estimate",
        )
    if engine.low_priority_values_first and not engine.priority:
        yield Problem(
            ("engine", "low_priority_values_first"), "orders priorities, but priority is off", "add priority: true"
        )
    if engine.cuda_graph_max_bs is not None and not engine.cuda_graph:
        yield Problem(
            ("engine", "cuda_graph_max_bs"), "limits CUDA graphs, but cuda_graph is off", "remove one of the two"
        )


def _parallel_conflicts(engine: EngineConfig) -> Iterator[Problem]:
    parallel, experts = engine.parallel, engine.experts
    if parallel.stage_layers is not None and len(parallel.stage_layers) != parallel.pp:
        message = f"layers of {len(parallel.stage_layers)} stages, but pp is {parallel.pp}"
        yield Problem(("engine", "parallel", "stage_layers"), message, f"give {parallel.pp} numbers of layers")
    if experts.redundant and experts.placement != "balanced":
        message = f"placement {experts.placement} has one copy of each expert"
        yield Problem(("engine", "experts", "redundant"), message, "use placement: balanced, or redundant: 0")
    elif experts.redundant % parallel.ep:
        message = f"{experts.redundant} further experts are not the same number on each of {parallel.ep} ranks (ep)"
        yield Problem(("engine", "experts", "redundant"), message, f"use a multiple of {parallel.ep}")
    if experts.dispatch == "all_to_all" and parallel.ep != parallel.tp:
        message = f"all_to_all sends tokens between all {parallel.tp} devices of a stage (tp), but ep is {parallel.ep}"
        yield Problem(("engine", "experts", "dispatch"), message, f"use ep: {parallel.tp}, or dispatch: all_reduce")


def _measure_conflicts(scenario: Scenario) -> Iterator[Problem]:
    measure = scenario.measure
    if isinstance(measure.until, dict):
        if "seconds" not in measure.until:
            yield Problem(("measure", "until"), "says nothing", "use drained, last_arrival or {seconds: NUMBER}")
        elif measure.until["seconds"] <= measure.skip_s:
            yield Problem(
                ("measure", "until"),
                f"the window ends after {measure.until['seconds']:g} s, before it begins (skip_s {measure.skip_s:g})",
                "use more seconds, or a smaller skip_s",
            )
    if not scenario.percentiles:
        yield Problem(("percentiles",), "the list is empty", "write for example [50, 90, 99]")
    if len(dict.fromkeys(scenario.percentiles)) != len(scenario.percentiles):
        yield Problem(("percentiles",), "a percentile is given twice", "name each percentile once")
    for metric, limits in scenario.slo:
        for statistic in limits or {}:
            if statistic != "mean" and not 0 < float(statistic[1:]) < 100:
                path = ("slo", metric, statistic)
                yield Problem(path, f"{statistic} is no percentile between 0 and 100", "use for example p50 or p99")


def _without_effect(scenario: Scenario, written: Mapping[str, Any]) -> Iterator[Problem]:
    """Warnings: the scenario runs, but a field does not do what its name promises."""
    engine = scenario.engine
    if scenario.routing != Routing():
        if scenario.disaggregation is not None:
            message = "has no effect with disaggregation: pairs of engines are taken at random"
            yield Problem(("routing",), message, "leave it out")
        elif engine.parallel.dp == 1:
            yield Problem(("routing",), "has no effect with one replica", "add parallel: {dp: ...}, or leave it out")
    if engine.policy in ("lpm", "dfs_weight") and engine.prefix_cache != "radix":
        yield Problem(
            ("engine", "policy"),
            f"{engine.policy} needs a prefix tree: with prefix_cache {engine.prefix_cache} it is fcfs (as in SGLang)",
            "use prefix_cache: radix, or policy: fcfs",
        )
    if engine.kv_tokens is not None and engine.kv_tokens % engine.page_size:
        kept = engine.kv_tokens // engine.page_size * engine.page_size
        message = f"{engine.kv_tokens} is rounded down to whole pages: {kept} tokens"
        yield Problem(("engine", "kv_tokens"), message, f"write {kept}")
    if engine.preset == "sglang-0.5.1" and engine.priority:
        yield Problem(
            ("engine", "priority"),
            "SGLang 0.5.1 has no priorities; they follow its version 0.5.3 here",
            "leave priority out to stay with 0.5.1",
        )
    if engine.parallel.ep == 1 and engine.experts != Experts():
        message = "has no effect with ep: 1: every device has a share of every expert"
        yield Problem(("engine", "experts"), message, "add parallel: {ep: ...}, or leave it out")
    if engine.kv_tokens is not None and "mem_fraction_static" in written.get("engine", {}) and engine.preset == "none":
        yield Problem(("engine", "mem_fraction_static"), "has no effect beside kv_tokens", "leave one of the two out")
