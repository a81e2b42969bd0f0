"""The bench that small engines share: 256 requests at once, 133,966 output tokens, the shape of Qwen3-0.6B in bf16.

Ours is ``execute`` of ``scenarios/shared_bench.yaml``: scheduler, loop and engine as for any run, with CUDA graphs for
all batch sizes. The other is ``transformers``' own continuous batching with the same lengths and temperature, random
weights of the same shape and its defaults, with the hints that its ``generate_batch`` would derive from the lengths, in
the same process right after. Time is from the first request to the last token, models loaded and warm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation.continuous_batching.utils import WorkloadHints

from testbed import execute, load_scenario
from testbed.scenario.models import find_config
from testbed.scenario.schema import Scenario
from tests.gpu.setting import Row, is_gpu, shape_of

FILE = Path(__file__).parents[2] / "scenarios" / "shared_bench.yaml"
ROWS = 256
THEIR_LIMIT_S = 200.0
"""Tokens of what has not finished by then do not count."""


def measure(device: torch.device) -> Iterator[Row]:
    """Tokens/s of both."""
    scenario = load_scenario(FILE).scenario
    lengths = np.loadtxt(FILE.with_suffix(".csv"), dtype=int, delimiter=",", skiprows=1)
    with shape_of(scenario.model, device) as model:
        if not is_gpu(device):
            lengths = lengths[:3] // 40 + 1
        yield _ours(scenario_of(scenario, model, device))
        yield _theirs(model, lengths.tolist(), device)


def scenario_of(scenario: Scenario, model: str, device: torch.device) -> Scenario:
    """The bench with graphs for all its rows; without a GPU three short requests to a tiny model."""
    if is_gpu(device):
        engine = scenario.engine.model_copy(update={"cuda_graph_max_bs": ROWS})
        return scenario.model_copy(update={"engine": engine})
    lengths = {name: {"kind": "fixed", "value": 8} for name in ("prompt_tokens", "output_tokens")}
    workload = {"count": 3, "arrivals": {"kind": "all_at_once"}, "lengths": lengths, "sampling": {"temperature": 0.6}}
    tiny: dict[str, Any] = {"model": model, "device": "h100-sxm", "workload": workload, "engine": {"kv_tokens": 256}}
    return load_scenario(tiny).scenario


def _ours(scenario: Scenario) -> Row:
    run = execute(scenario)
    seconds = float(run.records.token_times_ns.max() - run.requests["arrival_ns"].min()) / 1e9
    tokens = len(run.records.token_times_ns)
    return _row(f"testbed, {len(run.requests)} requests, loop {run.meta['loop']}", tokens, seconds)


def _theirs(model: str, lengths: list[list[int]], device: torch.device) -> Row:
    config = AutoConfig.for_model(**json.loads(find_config(model).read_text(encoding="utf-8")))
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens, done, seconds = _generate(network, lengths, config.vocab_size)
    return _row(f"transformers' continuous batching, {done} of {len(lengths)} requests finished", tokens, seconds)


def _generate(network: PreTrainedModel, lengths: list[list[int]], vocab: int) -> tuple[int, int, float]:
    """(tokens, requests, seconds) of what finished within the limit, by its public manager."""
    draw = np.random.Generator(np.random.Philox(key=0))
    prompts = [draw.integers(0, vocab, prompt).tolist() for prompt, _ in lengths]
    sampling = GenerationConfig(do_sample=True, temperature=0.6, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    tokens = done = 0
    most = (max(column) for column in zip(*lengths, strict=True))
    small = None if is_gpu(network.device) else ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    with network.continuous_batching_context_manager(
        generation_config=sampling,
        continuous_batching_config=small,  # by itself it takes all memory, which is right on a GPU only
        timeout=5,
        workload_hints=WorkloadHints(*most, num_requests=len(lengths)),
    ) as manager:
        manager.add_request(prompts[0], max_new_tokens=4)  # what is compiled at the first request is not timed
        while manager.get_result(timeout=1) is None and manager.is_running():
            pass
        begin = end = perf_counter()
        for prompt, (_, outputs) in zip(prompts, lengths, strict=True):
            manager.add_request(prompt, max_new_tokens=outputs)
        while done < len(prompts) and manager.is_running() and perf_counter() - begin < THEIR_LIMIT_S:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                tokens, done, end = tokens + len(result.generated_tokens), done + 1, perf_counter()
    if not done:
        raise RuntimeError("transformers' continuous batching finished no request")
    return tokens, done, end - begin


def _row(what: str, tokens: int, seconds: float) -> Row:
    figure = f"{tokens / seconds:.0f} tokens/s ({tokens} tokens in {seconds:.2f} s)"
    return Row(what, figure, values={"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds})
