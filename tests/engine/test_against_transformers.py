"""The engine against ``transformers`` in small, and log-probabilities wherever a request's life is not straight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from testbed.engine.inputs import SamplingNeeds, StepInputs
from testbed.engine.options import EngineOptions
from testbed.engine.runner import RunningStep
from testbed.messages import AbortRequest
from testbed.sampling import SamplingParams
from tests.engine.against_transformers import (
    CONTEXT,
    FAR,
    MARGIN,
    STEPS,
    TOLERANCE,
    Asked,
    Comparison,
    LogitsDevice,
    Reference,
    Setting,
    Tally,
    all_settings,
    compare,
    happened,
    hold_family,
    reference_of,
    requests_of,
    run_ours,
    shared_prompts,
)
from tests.engine.world import FAMILIES, reference_model, tiny_model

PLAIN = Setting("normal", "prefill_first", chunked=False, cached=False, forced=False, page_size=1, seats=8)
HARD = Setting("overlap", "mixed_chunk", chunked=True, cached=True, forced=True, page_size=16, seats=4)
LOOPS = ("normal", "overlap")


class Model(NamedTuple):
    folder: Path
    reference: Reference


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny Qwen2 (biases, grouped queries) and 32 prompts; each of the first eight comes three times."""
    folder = tiny_model("qwen2", tmp_path_factory.mktemp("models") / "qwen2", seed=7)
    theirs = reference_model(folder)
    prompts = shared_prompts(8, 32, theirs.config.vocab_size)
    return Model(folder, reference_of(theirs, [*prompts, *prompts[:8], *prompts[:8]]))


def everything(reference: Reference, numbers: Sequence[int], start: int = 0, **fields: object) -> list[Asked]:
    """Requests that want all log-probabilities from ``start`` on, as far as their prompts go."""
    wanted = {"return_logprob": True, "top_logprobs": 3, "outputs": STEPS, **fields}
    prompts = reference.prompts
    return [
        Asked(i, prompts[i], logprob_start=min(start, len(prompts[i]) - 1), **wanted)  # type: ignore[arg-type]
        for i in numbers
    ]


# -- tokens, logits, log-probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=list(FAMILIES))
def test_every_family_and_every_setting_in_small(number: int, tmp_path: Path) -> None:
    """The settings are dealt to the families: each is run by one of them."""
    family = list(FAMILIES)[number]
    for held in hold_family(family, tmp_path / family, all_settings()[number :: len(FAMILIES)], 40):
        assert held.comparison.holds, (held.setting, held.comparison)
        assert min(held.comparison.logits.compared, held.comparison.logprobs.compared) > 300
        assert held.happened.lacking(held.setting, 40) == []


@pytest.mark.parametrize("loop", LOOPS)
def test_a_pool_that_runs_out(model: Model, loop: str) -> None:
    """Retractions and evictions that memory asks for, not a die."""
    asked = requests_of(model.reference, 3)
    setting = HARD._replace(loop=loop, forced=False, page_size=1, seats=8)
    ran = run_ours(model.folder, setting, model.reference, asked, kv_tokens=400, clip_max_new_tokens=1)
    assert compare(ran).holds
    assert happened(ran.outcome).retractions > 0
    assert sum(batch.evicted_tokens for batch, _ in ran.outcome.batches) > 0


class WrongPage(LogitsDevice):
    """Takes every page of a decode step for the one before it."""

    def launch(self, inputs: StepInputs) -> RunningStep:
        if not len(inputs.prefill_slots):
            inputs.pages = np.maximum(inputs.pages - 1, 0)
        return super().launch(inputs)


class WrongToken(LogitsDevice):
    """Computes another token in the place of a prefill's first."""

    def launch(self, inputs: StepInputs) -> RunningStep:
        inputs.token_ids[:1] ^= 1
        return super().launch(inputs)


class WrongWeight(LogitsDevice):
    """One weight of tens of thousands is off by a hundredth of the deviation."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._runner.decoder.weights.layers[1].qkv[3, 5] += 0.003


@pytest.mark.parametrize("wrong", [WrongPage, WrongToken, WrongWeight])
def test_the_comparison_sees_what_is_wrong(model: Model, wrong: type[LogitsDevice]) -> None:
    asked = requests_of(model.reference, 4)[:16]
    found = compare(run_ours(model.folder, HARD, model.reference, asked, device_type=wrong))
    assert not found.holds
    assert found.logits.error > TOLERANCE


def test_close_calls_alone_are_excused(model: Model) -> None:
    """A reference with its second token in the place of the first: excused where the two are close, or where experts
    were at that position or before it."""
    number, step = 0, 2
    logits = model.reference.logits
    tokens = model.reference.tokens.copy()
    first, second = logits[number, step].topk(2).indices.tolist()
    tokens[number, step] = second
    prompt = model.reference.prompts[number]
    asked = [Asked(number, prompt, outputs=6)]

    def compared(gap: float, routed: int) -> Comparison:
        changed = logits.clone()
        changed[number, step, second] = changed[number, step, first] + gap
        positions = np.full(len(model.reference), routed)
        reference = Reference(model.reference.prompts, tokens, changed, model.reference.prompt_logprobs, positions)
        return compare(run_ours(model.folder, PLAIN, reference, asked))

    near, far = compared(0.5 * MARGIN, FAR), compared(2 * MARGIN, FAR)
    at, behind = (compared(2 * MARGIN, len(prompt) + step - 1 + later) for later in (0, 1))
    assert not near.wrong and near.tokens == Tally(3, 0.0, 1) and near.close == 1 and near.logits.compared == 3
    assert not at.wrong and at.tokens == Tally(3, 0.0, 1) and at.close == 0
    for found in (far, behind):
        assert len(found.wrong) == 1 and found.tokens == Tally(3, 1.0, 0) and not found.holds


def test_a_router_that_cannot_decide_is_found(tmp_path: Path) -> None:
    """Two experts with the same weights in the router tie wherever they stand at the edge."""
    folder = tiny_model("mixtral", tmp_path / "mixtral")
    theirs = reference_model(folder)
    prompts = shared_prompts(5, 36, theirs.config.vocab_size)
    decided = reference_of(theirs, prompts)
    with torch.no_grad():
        weight = theirs.model.layers[1].mlp.gate.weight
        weight[3] = weight[5]
    tied = reference_of(theirs, prompts)
    assert (decided.routed < FAR).mean() < 0.2
    assert (tied.routed < FAR).mean() > 0.8


# -- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_prompts_in_chunks_and_whole_have_the_same_log_probabilities(model: Model, loop: str) -> None:
    asked = everything(model.reference, range(18), outputs=2)
    settings = [PLAIN._replace(loop=loop, chunked=chunked, seats=2) for chunked in (False, True)]
    whole, cut = [run_ours(model.folder, setting, model.reference, asked) for setting in settings]
    assert happened(cut.outcome).chunks > 30
    for ran in (whole, cut):
        found = compare(ran)
        assert found.holds and found.logprobs.compared > sum(map(len, model.reference.prompts[:18]))
    for request in asked:
        one, other = (ran.outcome.outputs[request.rid].logprobs for ran in (whole, cut))
        assert one is not None and other is not None and len(one.prompt) == len(request.prompt)
        np.testing.assert_allclose(one.prompt, other.prompt, atol=TOLERANCE)


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_cached_prefix_ends_where_log_probabilities_are_wanted(model: Model, page_size: int) -> None:
    """The same prompts three times: the second has all but its last token in the cache, and uses none of it; the third
    uses what lies before position 20."""
    reference = model.reference
    asked = everything(reference, range(8))
    asked += [replace(request, iteration=200) for request in everything(reference, range(32, 40))]
    asked += [replace(request, iteration=400) for request in everything(reference, range(40, 48), start=20)]
    ran = run_ours(model.folder, PLAIN._replace(cached=True, page_size=page_size), reference, asked)
    assert compare(ran).holds
    cached = [ran.outcome.outputs[request.rid].cached_tokens for request in asked]
    assert not any(cached[:16])
    usable = [min(20, len(request.prompt) - 1) // page_size * page_size for request in asked[16:]]
    assert cached[16:] == usable and any(usable)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batching", ["prefill_first", "stall_free"])
def test_log_probabilities_survive_retraction(model: Model, loop: str, batching: str) -> None:
    """One for each token, those from before a retraction too, and the prompt's once."""
    setting = PLAIN._replace(loop=loop, batching=batching, chunked=True, cached=True, forced=True, seats=4)
    asked = everything(model.reference, range(16))
    ran = run_ours(model.folder, setting, model.reference, asked)
    retracted = [request for request in ran.outcome.requests.values() if request.retractions and request.old_outputs]
    assert len(retracted) > 3
    assert compare(ran).holds


def test_nothing_of_a_dropped_row_is_kept(model: Model) -> None:
    """Under overlap a request that stops, or is aborted, was launched once more: neither token nor log-probability of
    that row is its own."""
    reference = model.reference
    asked = [
        replace(request, sampling=SamplingParams(stop_token_ids=(int(reference.tokens[request.number, 5]),)))
        for request in everything(reference, range(16))
    ]
    asked += [replace(request, outputs=STEPS) for request in everything(reference, range(16, 32), iteration=2)]
    script = {9 + 2 * i: [AbortRequest(f"r{16 + i}")] for i in range(8)}
    ran = run_ours(model.folder, PLAIN._replace(loop="overlap", seats=32), reference, asked, script=script)
    reasons = [ran.outcome.outputs[request.rid].finish_reason for request in asked]
    assert reasons.count("stop") > 8 and reasons.count("abort") > 4 and reasons.count("length") > 4
    assert int(np.sum(ran.outcome.records.steps["extra_rows"])) >= reasons.count("stop") + reasons.count("abort")
    ended = [ran.outcome.outputs[request.rid] for request in asked]
    early = [
        replace(request, outputs=len(output.output_ids)) if output.finish_reason == "abort" else request
        for request, output in zip(asked, ended, strict=True)
    ]
    for request in ran.outcome.outputs.values():
        assert request.logprobs is not None
        assert len(request.logprobs.tokens) == len(request.logprobs.top) == len(request.output_ids)
    found = compare(ran._replace(asked=early))
    assert [line for line in found.wrong if "abort" not in line] == []
    assert found.logprobs.holds


@pytest.mark.parametrize("top", [0, 2])
def test_a_forced_token_has_its_own_log_probability(model: Model, top: int) -> None:
    """Where the oracle's tokens replace the drawn ones, it is theirs that is told."""
    device = LogitsDevice(EngineOptions(str(model.folder), "float32", 1, 2, kv_tokens=64, context_length=CONTEXT))
    count = np.arange(5, dtype=np.int32)
    inputs = StepInputs(
        0,
        places=count,
        pages=count + 1,
        token_ids=count + 40,
        token_slots=0 * count,
        token_positions=count,
        prefill_slots=count[:1],
        prefix_lens=count[:1],
        starts=np.array([0, 5], np.int32),
        row_slots=count[:1],
        forced=np.array([77], np.int32),
        needs=SamplingNeeds(logprobs=True, top_logprobs=top),
    )
    outputs = device.launch(inputs).wait()
    logprobs = torch.log_softmax(device.logits[0], dim=-1)
    assert outputs.token_ids.tolist() == [77]
    assert outputs.logprobs is not None and outputs.logprobs[0] == logprobs[0, 77]
    assert outputs.top_logprobs is not None and outputs.top_logprobs.shape == (1, top)
    np.testing.assert_array_equal(outputs.top_logprobs, logprobs.topk(top).values)


def test_a_request_for_no_token_has_no_log_probability_of_one(model: Model) -> None:
    """It asks what its prompt is worth."""
    asked = everything(model.reference, range(8), outputs=0)
    ran = run_ours(model.folder, PLAIN, model.reference, asked)
    assert compare(ran).holds
    for output in ran.outcome.outputs.values():
        assert output.logprobs is not None and len(output.output_ids) == 0
        assert output.logprobs.tokens == output.logprobs.top == [] and len(output.logprobs.prompt)


# -- rows without a token --------------------------------------------------------------------------------------------


class Poisoned(LogitsDevice):
    """Every ninth launch spoils the logits of every third row."""

    @torch.inference_mode()
    def spoil(self, inputs: StepInputs, logits: torch.Tensor) -> None:
        if inputs.index % 9 == 3:
            logits[inputs.index % 3 :: 3] = torch.nan


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("forced", [False, True])
def test_a_row_without_a_token_ends_with_an_error(model: Model, loop: str, forced: bool) -> None:
    """Nothing of that step is kept: tokens and log-probabilities are those from before it; nobody else notices."""
    asked = everything(model.reference, range(32))
    setting = PLAIN._replace(loop=loop, batching="stall_free", chunked=True, forced=forced)
    outcome = run_ours(model.folder, setting, model.reference, asked, device_type=Poisoned).outcome
    reasons = [outcome.outputs[request.rid].finish_reason for request in asked]
    assert reasons.count("error") > 4 and reasons.count("length") > 4
    for request in asked:
        output = outcome.outputs[request.rid]
        clear = min(int(model.reference.clear[request.number]), len(output.output_ids))
        assert output.output_ids[:clear].tolist() == model.reference.tokens[request.number, :clear].tolist()
        assert output.logprobs is not None
        assert len(output.logprobs.tokens) == len(output.logprobs.top) == len(output.output_ids)
        assert np.isfinite(output.logprobs.tokens).all()
        failed = output.finish_reason == "error"
        assert output.status == (500 if failed else 200) and bool(output.message) == failed
