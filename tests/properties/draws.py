"""What hypothesis draws: engines, pools and workloads, small enough that rare states are common."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st

from testbed.scenario.schema import EngineConfig
from tests.properties.world import Job, engine

LOOPS = ("normal", "overlap")
DESIGNS = ("overlap", "overlap_thread", "overlap_suspended")
"""Of overlap."""
STRATEGIES = ("prefill_first", "mixed_chunk", "stall_free", "static")
POLICIES = ("fcfs", "lpm", "dfs_weight", "lof", "random")
PAGE_SIZES = (1, 3, 16, 64)
CHUNKS = (1, 5, 16, 17, 64, 8192)


class World(NamedTuple):
    """An engine, its pool and its jobs."""

    config: EngineConfig
    kv_tokens: int
    jobs: list[Job]

    def twin(self, **fields: Any) -> World:
        """The same with other engine fields."""
        return self._replace(config=EngineConfig(**{**self.config.model_dump(), **fields}))


@st.composite
def engines(draw: st.DrawFn, page_size: int, sglang: bool = False, **fixed: Any) -> EngineConfig:
    fields: dict[str, Any] = {
        "loop": draw(st.sampled_from(LOOPS)),
        "batching": draw(st.sampled_from(STRATEGIES[:2] if sglang else STRATEGIES)),
        "policy": draw(st.sampled_from(POLICIES)),
        "priority": draw(st.booleans()),
        "low_priority_values_first": draw(st.booleans()),
        "chunked_prefill_size": draw(st.sampled_from([-1, *(size for size in CHUNKS if size >= page_size)])),
        "max_prefill_tokens": draw(st.sampled_from([1, 30, 16384])),
        "max_running_requests": draw(st.sampled_from([1, 2, 3, 8])),
        "prefix_cache": draw(st.sampled_from(["radix", "radix", "chunk"])),
        "eviction": draw(st.sampled_from(["lru", "lfu"])),
        "page_size": page_size,
        "init_new_token_ratio": draw(st.sampled_from([0.01, 0.7, 1.0])),
        "in_batch_check_threshold": draw(st.sampled_from([-1, 2, 32])),
        "in_batch_deprioritize_threshold": draw(st.sampled_from([1, 8])),
        "clip_max_new_tokens": draw(st.sampled_from([1, 8, 4096])),
    }
    if not sglang:
        fields["retract_to"] = draw(st.sampled_from(["arrival_rank", "back"]))
        fields["rules"] = {
            "retract_until": draw(st.sampled_from(["next_step_fits", "20_tokens_per_request"])),
            "reserve": draw(st.sampled_from(["estimate", "none"])),
            "prefill_budget": draw(st.sampled_from(["unchunked_only", "always"])),
            "retract_victim": draw(st.sampled_from(["fewest_outputs", "newest"])),
            "over_allocated": draw(st.sampled_from(["free_at_finish", "free_at_result"])),
            "evict_amount": draw(st.sampled_from(["shortfall", "whole_need"])),
        }
    return engine(sglang=sglang, **{**fields, **fixed})


@st.composite
def jobs(draw: st.DrawFn, largest: int, count: int = 9) -> list[Job]:
    """Up to ``count`` jobs whose prompt and output together stay below ``largest``; prompts share stems."""
    drawn = []
    for i in range(draw(st.integers(1, count))):
        prompt = draw(st.integers(1, max(1, largest - 8)))
        outputs = draw(st.integers(1, max(1, min(40, largest - prompt - 1))))
        stem = draw(st.integers(0, prompt))
        parts = ((draw(st.sampled_from("ab")), stem), (f"own {i}", prompt - stem))
        more = draw(st.sampled_from([0, 0, 0, 3, 200]))
        drawn.append(
            Job(
                f"r{i}",
                tuple(part for part in parts if part[1]),
                outputs,
                max_new_tokens=outputs + more if more else None,
                arrival_ns=draw(st.sampled_from([0, 0, 1, 20_000, 60_000, 10_000_000])),
                priority=draw(st.sampled_from([None, 0, 1])),
                extra_key=draw(st.sampled_from(["", "", "tenant"])),
            )
        )
    return drawn


@st.composite
def worlds(draw: st.DrawFn, sglang: bool = False, **fixed: Any) -> World:
    page_size = fixed.get("page_size") or draw(st.sampled_from(PAGE_SIZES))
    pages = draw(st.sampled_from([3, 5, 12])) if page_size > 3 else draw(st.integers(30, 140)) // page_size
    kv_tokens = pages * page_size + draw(st.integers(0, page_size - 1))
    largest = pages * page_size - 8
    config = draw(engines(page_size, sglang, **{k: v for k, v in fixed.items() if k != "page_size"}))
    return World(config, kv_tokens, draw(jobs(largest)))
