"""The scenario: what a user writes in YAML, validated once at the edge (``interface.md`` shows it whole).

Field names state their unit. Unknown fields are errors. Everything but ``model`` and ``workload`` has a default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from testbed.scenario.base import (
    Loops,
    Model,
    NonNegativeFloat,
    NonNegativeInt,
    PluginPath,
    PositiveFloat,
    PositiveInt,
)
from testbed.scenario.disaggregation import Disaggregation
from testbed.scenario.experts import Experts
from testbed.scenario.routing import Routing
from testbed.scenario.workload import WorkloadConfig


class Rules(Model):
    """Where engines decide differently: our default first, the engine's way second. Presets set these."""

    admission: Literal["every_step", "when_batch_shrinks"] = "every_step"
    """``when_batch_shrinks``: after a refusal nobody is admitted until the running batch has shrunk (SGLang's
    ``batch_is_full`` latch); admission is then one decode late, and a drained batch costs an empty iteration."""
    retract_until: Literal["next_step_fits", "20_tokens_per_request"] = "next_step_fits"
    """How many are retracted when memory runs out (SGLang 0.5.1 retracts until 20 free tokens per survivor)."""
    retracted_reserve: Literal["remaining", "whole"] = "remaining"
    """What a retracted request asks for again: what is left of its output, or the whole (can block SGLang's queue)."""
    reserve: Literal["estimate", "none"] = "estimate"
    """Admission reserves room for expected output (``new_token_ratio``), or none as vLLM (it preempts instead)."""
    chunk_align: Literal["page", "page_plus_one"] = "page"
    """Length of a chunk: whole pages, or SGLang 0.5.1's ``chunk - page + 1``."""
    over_allocated: Literal["free_at_finish", "free_at_result"] = "free_at_finish"
    """When the slot of the overlap loop's extra step is free again: at the finish, or when its late result came."""
    ignore_eos_admission: bool = False
    """SGLang's own admission rule for requests that ignore EOS while the prefix cache is off (a simulated finish
    order in place of the ratio)."""
    prefill_budget: Literal["unchunked_only", "always"] = "unchunked_only"
    """Whether ``max_prefill_tokens`` stops a request that chunking could cut (SGLang 0.5.1: always)."""
    retract_victim: Literal["fewest_outputs", "newest"] = "fewest_outputs"
    """Who is retracted first: the request with the least output to recompute (SGLang), or the last to come (vLLM)."""
    evict_amount: Literal["shortfall", "whole_need"] = "shortfall"
    """How much is evicted when free tokens do not suffice: what is missing, or the whole need (SGLang 0.5.1)."""
    can_stall: bool = False
    """Whether a request that no longer fits beside nobody may block the queue for ever (SGLang 0.5.1 can)."""


class Parallel(Model):
    """How many devices share the work: tensor, pipeline, data and expert parallel."""

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    dp: Loops = 1
    ep: PositiveInt = 1
    stage_layers: tuple[PositiveInt, ...] | None = None
    """Layers of each pipeline stage; None: as even as it goes, the first stages hold the remainder."""


class EngineConfig(Model):
    """The engine: loop, batching, policy, limits, memory."""

    preset: Literal["none", "sglang-0.5.1", "vllm-v1"] = "none"
    loop: (
        Literal["auto", "normal", "overlap", "overlap_thread", "overlap_suspended", "pipeline", "pipeline_async"]
        | PluginPath
    ) = "auto"
    """The family of the loop; prefill and decode engines have a normal and an overlapped one of their own."""
    batching: Literal["prefill_first", "mixed_chunk", "stall_free", "static"] | PluginPath = "prefill_first"
    policy: Literal["fcfs", "lpm", "dfs_weight", "lof", "random"] | PluginPath = "fcfs"
    priority: bool = False
    low_priority_values_first: bool = False
    retract_to: Literal["arrival_rank", "back"] = "arrival_rank"
    chunked_prefill_size: PositiveInt | Literal[-1] = 8192
    """Tokens of one prefill step (``stall_free``: of any step); -1: prompts are never cut."""
    max_prefill_tokens: PositiveInt = 16384
    max_running_requests: PositiveInt = 256
    max_queued_requests: PositiveInt | None = None
    context_length: PositiveInt | None = None
    """None: the model's."""
    mem_fraction_static: Annotated[float, Field(gt=0, lt=1)] = 0.88
    kv_tokens: PositiveInt | None = None
    """KV capacity when known from a server's log; None: from device memory, weights and ``mem_fraction_static``."""
    prefix_cache: Literal["radix", "chunk", "none"] = "radix"
    eviction: Literal["lru", "lfu"] = "lru"
    page_size: Annotated[int, Field(ge=1, le=1024)] = 1
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantization: Literal["none", "fp8"] = "none"
    kv_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8"] = "auto"
    attention: Literal["auto", "torch", "triton"] = "auto"
    """Attention backend of a real run; auto: triton on CUDA, else torch."""
    cuda_graph: bool = True
    cuda_graph_max_bs: PositiveInt | None = None
    """None: as SGLang (160, 256 above 90 GB of device memory)."""
    parallel: Parallel = Parallel()
    experts: Experts = Experts()
    schedule_conservativeness: NonNegativeFloat = 1.0
    init_new_token_ratio: Annotated[float, Field(gt=0, le=1)] = 0.7
    min_new_token_ratio_factor: Annotated[float, Field(ge=0, le=1)] = 0.14
    new_token_ratio_decay_steps: PositiveInt = 600
    clip_max_new_tokens: PositiveInt = 4096
    in_batch_check_threshold: Annotated[int, Field(ge=-1)] = 32
    in_batch_deprioritize_threshold: PositiveInt = 32
    rules: Rules = Rules()


class ConstantDevice(Model):
    """A device of constant step times, for cases that queueing theory can check.

    The times are those of the whole model: a pipeline stage takes its layers' share of them.
    """

    prefill_ns: NonNegativeInt = 0
    decode_ns: NonNegativeInt = 0
    prefill_token_ns: NonNegativeFloat = 0.0
    decode_row_ns: NonNegativeFloat = 0.0
    activation_ns: NonNegativeInt = 0
    """From one pipeline stage to the next."""


class DeviceConstant(Model):
    """``device: {constant: {prefill_ns: ..., decode_ns: ...}}``."""

    constant: ConstantDevice


class ConstantHost(Model):
    """A host that costs the same in every iteration (charged to the SCHEDULE stage)."""

    iteration_ns: NonNegativeInt


class HostConstant(Model):
    """``host: {constant: {iteration_ns: ...}}``."""

    constant: ConstantHost


class Measure(Model):
    """The window that aggregates are taken over."""

    skip_s: NonNegativeFloat = 0.0
    until: Literal["drained", "last_arrival"] | dict[Literal["seconds"], PositiveFloat] = "drained"


Quantile = Annotated[str, Field(pattern=r"^(mean|p\d{1,2}(\.\d+)?)$", description="mean | p50 | p99 | p99.9")]


class Slo(Model):
    """Latency limits, in ms, by statistic: ``ttft_ms: {p99: 1000}``. A request is good when it meets every limit."""

    ttft_ms: dict[Quantile, PositiveFloat] | None = None
    tpot_ms: dict[Quantile, PositiveFloat] | None = None
    itl_ms: dict[Quantile, PositiveFloat] | None = None
    e2el_ms: dict[Quantile, PositiveFloat] | None = None


class Scenario(Model):
    """One experiment: model, device, host, engine, workload, what is measured."""

    name: Annotated[str, Field(min_length=1)] = "scenario"
    model: str
    device: str | DeviceConstant = "h100-sxm"
    host: str | HostConstant = "testbed"
    cost_model: PluginPath | None = None
    """None: the operator cost model of the device profile."""
    engine: EngineConfig = EngineConfig()
    workload: WorkloadConfig
    routing: Routing = Routing()
    disaggregation: Disaggregation | None = None
    """None: every engine prefills and decodes."""
    measure: Measure = Measure()
    slo: Slo = Slo()
    percentiles: tuple[Annotated[float, Field(gt=0, lt=100)], ...] = (50, 90, 95, 99)
    tokens: Literal["model", "oracle"] = "model"
    executor: Literal["real", "paced", "simulated"] = "real"
    """What ``testbed run`` runs it on: this machine's device, or the cost model in real or in virtual time. ``testbed
    simulate`` is always simulated."""
    host_inject: str | None = None
    seed: NonNegativeInt = 0
    compare: dict[str, dict[str, Any]] | None = None
    """Variants by name: field paths and their values, e.g. ``{normal: {engine.loop: normal}}``."""
