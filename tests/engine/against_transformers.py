"""The whole engine against ``transformers``: one set of random prompts, once through its ``generate``, then through
scheduler, loop and device under every row of a covering array.

Compared are every output token, the raw logits of every row of every step that draws a token, and the
log-probabilities that requests ask for. At a deviation of 0.3 logits have a deviation of 2.4, and a tolerance of 1e-4
is some hundred times float32's own step at their largest.

Margin rule: a token is a close call where the reference's two best logits are less than ``MARGIN`` apart. There, and
only there, another token is excused; what follows it in that request is not compared, since its context is another
one. Nothing of the kind excuses a router of experts: two experts that tie to the last bits would show as a failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from testbed.batch import Batch, ForwardMode
from testbed.engine.build import LocalDevice, build_runner
from testbed.engine.inputs import StepInputs
from testbed.engine.options import EngineOptions
from testbed.engine.runner import RunningStep
from testbed.messages import GenerateRequest, RequestOutput, TokenPrompt
from testbed.request import Request
from testbed.sampling import DEFAULT_SAMPLING, SamplingParams
from testbed.scheduler import retraction
from testbed.scheduler.batching import STRATEGIES, BatchingStrategy
from testbed.scheduler.scheduler import Scheduler
from testbed.workload.base import TimedRequest
from tests.engine.covering import covering_array
from tests.engine.machine import runs_on
from tests.engine.world import FAMILIES, reference_model, tiny_model
from tests.properties.world import Outcome, Script, drained, ended_once, engine, run, times_add_up, work_adds_up

TOLERANCE = 1e-4
"""Absolute, of logits and log-probabilities (float32)."""
MARGIN = 2 * TOLERANCE
"""Two logits that are each right to the tolerance change places only when they are closer than this."""
MOST_CLOSE = 0.01
"""Close calls are at most this share of the tokens."""

STEPS = 24
"""The longest output."""
STEMS, STEM_TOKENS = 4, 150
"""Beginnings that prompts share, longer than two pages of 64."""
LENGTHS = (1, 2, 7, 15, 16, 17, 33, 48, 63, 64, 65, 80, 100, 127, 128, 129, 150, 200)
"""Of prompts: few, so that the reference needs no padding, around the ends of pages."""
KV_TOKENS = 16_384
"""Room for 64 requests of the longest kind, in pages of 64."""
CONTEXT = 256

FACTORS: dict[str, tuple[Any, ...]] = {
    "loop": ("normal", "overlap"),
    "batching": ("prefill_first", "mixed_chunk", "stall_free"),
    "chunked": (False, True),
    "cached": (False, True),
    "forced": (False, True),
    "page_size": (1, 16, 64),
    "seats": (1, 4, 16, 64),
}


class Setting(NamedTuple):
    """A row of the array."""

    loop: str
    batching: str
    chunked: bool
    """Prompts are cut."""
    cached: bool
    """Prompts' beginnings come from the prefix cache."""
    forced: bool
    """Random requests are retracted at random steps."""
    page_size: int
    seats: int
    """Requests that run at once, at most."""

    def __str__(self) -> str:
        extras = [name for name in ("chunked", "cached", "forced") if getattr(self, name)]
        return f"{self.loop}, {self.batching}, pages of {self.page_size}, {', '.join([f'batch {self.seats}', *extras])}"


def all_settings() -> list[Setting]:
    """Every two levels of two factors meet in one of them."""
    return [Setting(*row) for row in covering_array(FACTORS)]


# -- the reference ------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """What ``transformers`` makes of n prompts."""

    prompts: list[NDArray[np.int32]]
    tokens: NDArray[np.int32]
    """int32 [n, STEPS]: greedy, no end of sequence."""
    logits: Tensor
    """float32 [n, STEPS, vocab]: what each token was chosen from."""
    prompt_logprobs: list[NDArray[np.float32]]
    """float32 [length] each: of a prompt's token after those before it; the first is NaN."""
    close: NDArray[np.bool_] = field(init=False)
    """[n, STEPS]: close calls."""
    clear: NDArray[np.int64] = field(init=False)
    """[n]: tokens before the first close call."""

    def __post_init__(self) -> None:
        best = self.logits.topk(2).values
        self.close = (best[..., 0] - best[..., 1] < MARGIN).numpy()
        self.clear = np.where(self.close.any(1), self.close.argmax(1), STEPS)

    def __len__(self) -> int:
        return len(self.prompts)

    def logprobs(self, i: int) -> Tensor:
        """Of prompt i's outputs, float32 [STEPS, vocab]."""
        return torch.log_softmax(self.logits[i], dim=-1)


def shared_prompts(seed: int, count: int, vocab: int) -> list[NDArray[np.int32]]:
    """Random ids; most prompts begin as others do, for a random number of tokens. Every length occurs."""
    draw = np.random.Generator(np.random.Philox(key=seed)).integers
    stems = draw(0, vocab, (STEMS, STEM_TOKENS), dtype=np.int32)
    prompts = []
    for i in range(count):
        length = LENGTHS[i % len(LENGTHS)]
        prompt = draw(0, vocab, length, dtype=np.int32)
        shared = min(int(draw(0, STEM_TOKENS, endpoint=True)), length) if draw(0, 4) else 0
        prompt[:shared] = stems[draw(0, STEMS), :shared]
        prompts.append(prompt)
    return [prompts[i] for i in np.random.Generator(np.random.Philox(key=seed + 1)).permutation(count)]


@torch.inference_mode()
def reference_of(model: PreTrainedModel, prompts: Sequence[NDArray[np.int32]]) -> Reference:
    """Greedy ``generate`` and its logits; prompts of one length are one batch."""
    vocab = model.config.vocab_size
    model.generation_config.eos_token_id = None  # every prompt goes on to the last step
    wanted = GenerationConfig(
        do_sample=False, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    tokens = np.empty((len(prompts), STEPS), np.int32)
    logits = torch.empty((len(prompts), STEPS, vocab))
    prompt_logprobs = [np.full(len(prompt), np.nan, np.float32) for prompt in prompts]
    for length in {len(prompt): None for prompt in prompts}:
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.from_numpy(np.stack([prompts[i] for i in rows])).long()
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=wanted)
        tokens[rows] = answer.sequences[:, length:].numpy()
        logits[rows] = torch.stack(answer.logits, dim=1)
        logprobs = torch.log_softmax(model(ids).logits[:, :-1], dim=-1)
        for i, of_prompt in zip(rows, logprobs.gather(2, ids[:, 1:, None])[..., 0], strict=True):
            prompt_logprobs[i][1:] = of_prompt.numpy()
    return Reference(list(prompts), tokens, logits, prompt_logprobs)


# -- our run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request for the continuation of one of the reference's prompts: a job of ``tests.properties.world``."""

    number: int
    prompt: NDArray[np.int32]
    outputs: int
    """``max_new_tokens``."""
    iteration: int = 0
    sampling: SamplingParams = DEFAULT_SAMPLING
    return_logprob: bool = False
    top_logprobs: int = 0
    logprob_start: int = -1
    arrival_ns: int = 0

    @property
    def rid(self) -> str:
        return f"r{self.number}"

    def timed(self) -> TimedRequest:
        message = GenerateRequest(
            self.rid,
            TokenPrompt(self.prompt),
            self.outputs,
            sampling=self.sampling,
            return_logprob=self.return_logprob,
            top_logprobs=self.top_logprobs,
            logprob_start=self.logprob_start,
        )
        return TimedRequest(0, message, self.outputs, iteration=self.iteration)


def requests_of(reference: Reference, seed: int) -> list[Asked]:
    """One request a prompt, of random length; they come a few at a time. Some end at a stop token that the reference
    is known to give, some want log-probabilities, some of these of the prompt from a random position on."""
    draw = np.random.Generator(np.random.Philox(key=seed)).integers
    asked = []
    for i, prompt in enumerate(reference.prompts):
        stops = (int(reference.tokens[i, draw(0, STEPS)]),) if not draw(0, 4) else ()
        wants = not draw(0, 3)
        asked.append(
            Asked(
                i,
                prompt,
                outputs=int(draw(1, STEPS, endpoint=True)),
                iteration=int(draw(0, 2 + len(reference) // 16)),
                sampling=SamplingParams(stop_token_ids=stops),
                return_logprob=wants,
                top_logprobs=int(draw(0, 6)) if wants else 0,
                logprob_start=int(draw(-1, len(prompt))) if wants else -1,
            )
        )
    return asked


class LogitsDevice(LocalDevice):
    """Keeps the logits of every step, between its two phases."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(build_runner(options, torch.device("cpu")))
        self.logits: dict[int, Tensor] = {}
        """By launch: float32 [rows, vocab]."""

    def launch(self, inputs: StepInputs) -> RunningStep:
        """See device.Device."""
        inputs.defer_sampling = True
        step = super().launch(inputs)
        assert step.logits is not None
        self.logits[inputs.index] = step.logits.clone()
        step.sample(None)
        return step


class Retracting:
    """A batching strategy with forced retractions: at random steps random requests give their KV back and wait again,
    the one whose prompt is half computed among them."""

    def __init__(self, inner: BatchingStrategy, seed: int) -> None:
        self._inner = inner
        self._draw = np.random.Generator(np.random.Philox(key=seed))

    def next_batch(self, scheduler: Scheduler) -> Batch | None:
        """Every sixth step or so begins with a retraction."""
        if self._draw.random() < 1 / 6:
            self._retract_some(scheduler)
        return self._inner.next_batch(scheduler)

    def _retract_some(self, scheduler: Scheduler) -> None:
        running = scheduler.running
        running.filter_finished()
        share = self._draw.random()
        chosen = self._draw.random(len(running)) < share
        victims = [request for request, taken in zip(running.requests, chosen, strict=True) if taken]
        if scheduler.chunked is not None and self._draw.random() < share:
            victims.append(scheduler.chunked)
            scheduler.chunked = None
        if not victims:
            return
        for request in victims:
            retraction._retract(scheduler, request)
        running.keep(np.flatnonzero(~chosen).tolist())
        retraction._wait_again(scheduler, victims)
        reported = Batch(ForwardMode.DECODE)  # as after a decode step that its retractions left empty
        before = scheduler.vacated.retracted if scheduler.vacated is not None else ()
        reported.retracted = [*before, *victims]
        scheduler.vacated = reported


class Ran(NamedTuple):
    """A run and what it was held against."""

    reference: Reference
    asked: list[Asked]
    outcome: Outcome
    logits: dict[int, Tensor]


def run_ours(
    folder: Path,
    setting: Setting,
    reference: Reference,
    asked: Sequence[Asked],
    *,
    kv_tokens: int = KV_TOKENS,
    script: Script | None = None,
    seed: int = 0,
    device_type: type[LogitsDevice] = LogitsDevice,
    **fields: Any,
) -> Ran:
    """The requests through scheduler, loop and device, in this process, in float32. ``seed``: of forced retractions;
    ``fields``: more of the engine's."""
    options = EngineOptions(
        str(folder),
        "float32",
        setting.page_size,
        setting.seats,
        kv_tokens=kv_tokens,
        context_length=CONTEXT,
        attention="torch",
    )
    config = engine(
        loop=setting.loop,
        batching=setting.batching,
        chunked_prefill_size=setting.page_size + 8 * setting.seats if setting.chunked else -1,
        prefix_cache="radix" if setting.cached else "none",
        page_size=setting.page_size,
        max_running_requests=setting.seats,
        **fields,
    )
    strategy = STRATEGIES[setting.batching]()
    device = device_type(options)
    jobs: Any = asked
    outcome = run(
        config,
        jobs,
        kv_tokens=device.info.kv_tokens,
        context_length=CONTEXT,
        strategy=Retracting(strategy, seed) if setting.forced else strategy,
        script=script,
        prove=False,  # of what it proves, the oracle's tokens are not ours
        device_of=runs_on(device, forced=False),
    )
    for law in (ended_once, times_add_up, work_adds_up):
        law(outcome)
    drained(outcome.scheduler)
    return Ran(reference, list(asked), outcome, device.logits)


# -- the comparison -----------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """What was compared, and what was found."""

    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    close: int = 0
    """Close calls among them."""
    excused: int = 0
    """Close calls that went the other way."""
    rows: int = 0
    """Rows whose logits were compared."""
    logits_error: float = 0.0
    logprobs: int = 0
    logprobs_error: float = 0.0

    def add(self, other: Comparison) -> None:
        """Sum of counts, maximum of errors."""
        self.wrong += other.wrong
        for name in ("tokens", "close", "excused", "rows", "logprobs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("logits_error", "logprobs_error"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))

    @property
    def holds(self) -> bool:
        """Everything equal, within tolerance and margin, and the margin seldom needed."""
        near = max(self.logits_error, self.logprobs_error) <= TOLERANCE
        return not self.wrong and near and self.close <= MOST_CLOSE * self.tokens

    def see_logprobs(self, ours: Any, theirs: Any) -> None:
        """Compare two arrays of log-probabilities; NaN only where both have it."""
        error = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
        self.logprobs += error.size
        self.logprobs_error = max(self.logprobs_error, float(error.max(initial=0.0)))


def compare(ran: Ran) -> Comparison:
    """Tokens, logits and log-probabilities of a run against the reference's."""
    found = Comparison()
    for asked in ran.asked:
        output = ran.outcome.outputs[asked.rid]
        agreed = _compare_tokens(found, ran.reference, asked, output)
        if asked.return_logprob:
            _compare_logprobs(found, ran.reference, asked, output, agreed)
    for batch, _ in ran.outcome.batches:
        _compare_logits(found, ran.reference, batch, ran.logits[batch.index])
    return found


def expected_ids(reference: Reference, asked: Asked) -> NDArray[np.int32]:
    """The reference's tokens, up to the first stop token or the request's length."""
    tokens = reference.tokens[asked.number, : asked.outputs]
    stops = np.flatnonzero(np.isin(tokens, asked.sampling.stop_token_ids))
    return tokens[: stops[0] + 1] if len(stops) else tokens


def _compare_tokens(found: Comparison, reference: Reference, asked: Asked, output: RequestOutput) -> int:
    """Returns how many leading tokens agree."""
    ours, theirs = output.output_ids, expected_ids(reference, asked)
    common = min(len(ours), len(theirs))
    different = np.flatnonzero(ours[:common] != theirs[:common])
    agreed = int(different[0]) if len(different) else common
    close = reference.close[asked.number]
    found.tokens += agreed
    found.close += int(close[:agreed].sum())
    if agreed == len(ours) == len(theirs):
        reason = "stop" if len(theirs) < asked.outputs else "length"
        if output.finish_reason != reason:
            found.wrong.append(f"{asked.rid} ended by {output.finish_reason}, not {reason}")
    elif len(different) and close[agreed]:
        found.tokens, found.close, found.excused = found.tokens + 1, found.close + 1, found.excused + 1
    else:
        found.wrong.append(f"{asked.rid}: {ours.tolist()}, reference {theirs.tolist()}")
    return agreed


def _compare_logprobs(
    found: Comparison, reference: Reference, asked: Asked, output: RequestOutput, agreed: int
) -> None:
    ours = output.logprobs
    assert ours is not None
    theirs = reference.logprobs(asked.number)[:agreed]
    ids = torch.from_numpy(output.output_ids[:agreed]).long()
    found.see_logprobs(ours.tokens[:agreed], theirs.gather(1, ids[:, None])[:, 0])
    if len(ours.tokens) != len(output.output_ids):
        found.wrong.append(f"{asked.rid}: {len(ours.tokens)} log-probabilities of {len(output.output_ids)} tokens")
    if asked.top_logprobs:
        best = theirs.topk(asked.top_logprobs).values
        for (top_ids, top), row, values in zip(ours.top[:agreed], theirs, best, strict=True):
            found.see_logprobs(top, values)
            found.see_logprobs(top, row[torch.from_numpy(top_ids).long()])  # close ones may change places
    if asked.logprob_start >= 0:
        expected = reference.prompt_logprobs[asked.number].copy()
        expected[: asked.logprob_start + 1] = np.nan
        if not np.array_equal(np.isnan(ours.prompt), np.isnan(expected)):
            found.wrong.append(f"{asked.rid}: log-probabilities of other prompt tokens than from {asked.logprob_start}")
        wanted = ~np.isnan(expected)
        found.see_logprobs(ours.prompt[wanted], expected[wanted])


def _compare_logits(found: Comparison, reference: Reference, batch: Batch, logits: Tensor) -> None:
    """Rows that draw the next token of a context that the reference had too: up to the first close call."""
    rows: list[tuple[int, Request, int]] = [
        (row, p.request, p.prefix_tokens + p.new_tokens) for row, p in enumerate(batch.prefills) if p.last
    ]
    if batch.decodes:
        rows += zip(range(len(batch.prefills), batch.rows), batch.decodes, batch.seq_lens.tolist(), strict=True)
    drawn = [(row, int(request.rid[1:]), length - request.prompt_tokens) for row, request, length in rows]
    known = [(row, i, step) for row, i, step in drawn if step <= min(reference.clear[i], STEPS - 1)]
    if known:
        ours, prompts, steps = map(list, zip(*known, strict=True))
        error = (logits[ours] - reference.logits[prompts, steps]).abs().max()
        found.rows += len(known)
        found.logits_error = max(found.logits_error, float(error))


class Happened(NamedTuple):
    """What a run went through."""

    retractions: int
    hits: int
    """Requests that found a cached prefix."""
    chunks: int
    """Prefills that were not a prompt's last."""
    mixed: int
    """Steps with prefills and decodes."""
    largest: int
    """Most rows of a decode step."""

    def __str__(self) -> str:
        return (
            f"{self.retractions} retractions, {self.hits} prefix hits, {self.chunks} chunks before the last, "
            f"{self.mixed} mixed steps, {self.largest} rows"
        )

    def lacking(self, setting: Setting, requests: int) -> list[str]:
        """What the setting asks for and did not happen, or the other way round. A few requests do not fill 64 seats;
        a single seat leaves nobody to be mixed with."""
        asked = {
            "retractions": (setting.forced, self.retractions),
            "prefix hits": (setting.cached, self.hits),
            "chunks": (setting.chunked, self.chunks),
            "mixed steps": (setting.batching != "prefill_first" and setting.seats > 1, self.mixed),
        }
        found = [f"{setting}: {count} {name}" for name, (wanted, count) in asked.items() if wanted != (count > 0)]
        if self.largest < min(setting.seats, requests // 2):
            found.append(f"{setting}: no more than {self.largest} rows")
        return found


def happened(outcome: Outcome) -> Happened:
    """Counts of a run."""
    batches = [batch for batch, _ in outcome.batches]
    return Happened(
        retractions=sum(len(batch.retracted) for batch in batches),
        hits=sum(output.cached_tokens > 0 for output in outcome.sent),
        chunks=sum(not prefill.last for batch in batches for prefill in batch.prefills),
        mixed=sum(bool(batch.prefills and batch.decodes) for batch in batches),
        largest=max(len(batch.decodes) for batch in batches),
    )


class Held(NamedTuple):
    """One family under one setting."""

    setting: Setting
    comparison: Comparison
    happened: Happened


def hold_family(family: str, folder: Path, settings: Sequence[Setting], requests: int) -> list[Held]:
    """A tiny model of the family under each setting, the same random prompts in all; the seed is the family's own."""
    seed = 10 * list(FAMILIES).index(family)
    model = reference_model(tiny_model(family, folder, seed))
    reference = reference_of(model, shared_prompts(seed, requests, model.config.vocab_size))
    asked = requests_of(reference, seed + 2)
    held = []
    for setting in settings:
        ran = run_ours(folder, setting, reference, asked, seed=seed + 3)
        held.append(Held(setting, compare(ran), happened(ran.outcome)))
    return held
