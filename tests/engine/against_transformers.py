"""The whole engine against ``transformers``: one set of random prompts, once through its ``generate``, then through
scheduler, loop and device under every row of a covering array.

Compared are every output token, the raw logits of every row of every step that draws a token, and the log-probabilities
that requests ask for. Weights have a deviation of 0.3, so logits have one of 2.4.

Margin rule: a choice between two numbers that the reference has less than ``MARGIN`` apart is a close call. It is the
token, between the two best logits; and with a router of experts, between the last expert that is taken and the first
that is not. What a close call changes is excused, and counted: the token itself, after which the request's context is
another one and is not compared; the logits at and after the position that is routed. A difference without a close call
is a failure. At full size one position of Mixtral needs it: its experts are 6e-8 apart in the reference and 1e-5 in
float64, where the other one is taken, as in all but one of our runs.
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
from torch.nn import functional
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
PORTABLE = 2 * TOLERANCE
"""What ``holds`` asks for, so that a test does not hang on the order in which a CPU's library adds: against float64,
transformers' own float32 is wrong by up to 1.2e-4 here (Mixtral). The evidence at full size asks for TOLERANCE."""
MARGIN = 2 * TOLERANCE
"""Two logits that are each right to the tolerance change places only when they are closer than this."""
MOST_EXCUSED = 0.01
"""At most this share of the tokens is a close call, and of anything that is compared is excused."""

STEPS = 24
"""The longest output."""
STEMS, STEM_TOKENS = 4, 150
"""Beginnings that prompts share, longer than two pages of 64."""
LENGTHS = (1, 2, 7, 15, 16, 17, 33, 48, 63, 64, 65, 80, 100, 127, 128, 129, 150, 200)
"""Of prompts: few, so that the reference needs no padding, around the ends of pages."""
KV_TOKENS = 16_384
"""Room for 64 requests of the longest kind, in pages of 64."""
CONTEXT = 256
FAR = 1 << 30

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
    routed: NDArray[np.int64]
    """[n]: the first position of prompt and output whose routing is a close call; FAR where there is none."""
    close: NDArray[np.bool_] = field(init=False)
    """[n, STEPS]: tokens that are close calls."""
    clear: NDArray[np.int64] = field(init=False)
    """[n]: tokens before the first close call."""

    def __post_init__(self) -> None:
        best = self.logits.topk(2).values
        self.close = (best[..., 0] - best[..., 1] < MARGIN).numpy()
        self.clear = np.where(self.close.any(1), self.close.argmax(1), STEPS)

    def __len__(self) -> int:
        return len(self.prompts)

    def excusable(self, i: Any, positions: Any) -> NDArray[np.bool_]:
        """Whether logits at these positions of prompt i's sequence (or of prompts i) may be other experts'."""
        return np.asarray(positions) >= self.routed[i]

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
    routed = np.full(len(prompts), FAR)
    for length in {len(prompt): None for prompt in prompts}:
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.from_numpy(np.stack([prompts[i] for i in rows])).long()
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=wanted)
        tokens[rows] = answer.sequences[:, length:].numpy()
        logits[rows] = torch.stack(answer.logits, dim=1)
        whole, routed[rows] = _forward(model, answer.sequences)
        logprobs = torch.log_softmax(whole[:, : length - 1], dim=-1)
        for i, of_prompt in zip(rows, logprobs.gather(2, ids[:, 1:, None])[..., 0], strict=True):
            prompt_logprobs[i][1:] = of_prompt.numpy()
    return Reference(list(prompts), tokens, logits, prompt_logprobs, routed)


def _forward(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, NDArray[np.int64]]:
    """Logits of whole sequences [b, t], and the first position of each whose routing is a close call."""
    gaps: list[Tensor] = []

    def look(router: Any, inputs: tuple[Tensor], output: object) -> None:
        best = functional.linear(inputs[0], router.weight).topk(model.config.num_experts_per_tok + 1).values
        gaps.append((best[..., -2] - best[..., -1]).view(ids.shape))

    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [router.register_forward_hook(look) for router in routers]
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    close = np.array([(gap < MARGIN).numpy() for gap in gaps]).any(0) if gaps else np.zeros(ids.shape, np.bool_)
    return logits, np.where(close.any(1), close.argmax(1), FAR)


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
        self.spoil(inputs, step.logits)
        step.sample(None)
        return step

    def spoil(self, inputs: StepInputs, logits: Tensor) -> None:
        """For tests of what goes wrong: change the logits that tokens are drawn from."""


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
    device_type: type[LogitsDevice] = LogitsDevice,
    **how: Any,
) -> Ran:
    """The requests through scheduler, loop and device, in this process, in float32. ``how``: of ``run_asked``."""
    device = device_type(options_of(folder, setting, kv_tokens))
    return Ran(reference, list(asked), run_asked(device, setting, asked, **how), device.logits)


def options_of(folder: Path, setting: Setting, kv_tokens: int = KV_TOKENS) -> EngineOptions:
    """What a device for this setting is started with."""
    return EngineOptions(
        str(folder),
        "float32",
        setting.page_size,
        setting.seats,
        kv_tokens=kv_tokens,
        context_length=CONTEXT,
        attention="torch",
    )


def run_asked(
    device: LogitsDevice,
    setting: Setting,
    asked: Sequence[Asked],
    *,
    script: Script | None = None,
    seed: int = 0,
    run_seed: int = 0,
    **fields: Any,
) -> Outcome:
    """The requests on a device of this setting. ``seed``: of forced retractions; ``run_seed``: of requests without
    one; ``fields``: more of the engine's."""
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
    jobs: Any = asked
    outcome = run(
        config,
        jobs,
        kv_tokens=device.info.kv_tokens,
        context_length=CONTEXT,
        strategy=Retracting(strategy, seed) if setting.forced else strategy,
        script=script,
        prove=False,  # of what it proves, the oracle's tokens are not ours
        device_of=runs_on(device, forced=False, seed=run_seed),
    )
    for law in (ended_once, times_add_up, work_adds_up):
        law(outcome)
    drained(outcome.scheduler)
    return outcome


# -- the comparison -----------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Numbers of one kind."""

    compared: int = 0
    error: float = 0.0
    """The largest that is not excused."""
    excused: int = 0

    def see(self, error: Any, excusable: Any) -> None:
        """Count absolute errors, one or an array of them; ``excusable``: those with a close call behind them."""
        error = np.asarray(error, np.float64)
        excused = (error > TOLERANCE) & excusable
        self.compared += error.size
        self.excused += int(excused.sum())
        self.error = max(self.error, float(error[~excused].max(initial=0.0)))

    def add(self, other: Tally) -> None:
        """Both together."""
        self.compared += other.compared
        self.error = max(self.error, other.error)
        self.excused += other.excused

    @property
    def holds(self) -> bool:
        """Within the tolerance, and few excused."""
        return self.error <= PORTABLE and self.excused <= MOST_EXCUSED * self.compared


@dataclass
class Comparison:
    """What was compared, and what was found."""

    wrong: list[str] = field(default_factory=list)
    tokens: Tally = field(default_factory=Tally)
    """A token that is another one is an error of 1."""
    close: int = 0
    """Tokens that are close calls."""
    logits: Tally = field(default_factory=Tally)
    """Rows, by their largest error."""
    logprobs: Tally = field(default_factory=Tally)

    def add(self, other: Comparison) -> None:
        """Both together."""
        self.wrong += other.wrong
        self.close += other.close
        self.tokens.add(other.tokens)
        self.logits.add(other.logits)
        self.logprobs.add(other.logprobs)

    @property
    def holds(self) -> bool:
        """Everything is equal by tolerance and margin, and the margin is seldom needed."""
        tallies = (self.tokens, self.logits, self.logprobs)
        seldom = self.close <= MOST_EXCUSED * self.tokens.compared
        return not self.wrong and seldom and all(tally.holds for tally in tallies)


def compare(ran: Ran) -> Comparison:
    """Tokens, logits and log-probabilities of a run against the reference's."""
    found = Comparison()
    comparable = ran.reference.clear.copy()
    """[n]: outputs whose context is the reference's, whatever a dropped row drew: up to the first close call."""
    for asked in ran.asked:
        output = ran.outcome.outputs[asked.rid]
        agreed = _compare_tokens(found, ran.reference, asked, output)
        if agreed < len(output.output_ids):
            comparable[asked.number] = min(agreed, comparable[asked.number])
        if asked.return_logprob:
            _compare_logprobs(found, ran.reference, asked, output, agreed)
    for batch, _ in ran.outcome.batches:
        _compare_logits(found, ran.reference, comparable, batch, ran.logits[batch.index])
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
    compared = agreed + min(len(different), 1)
    found.tokens.see(np.zeros(agreed), False)
    found.close += int(close[:compared].sum())
    if len(different):
        excusable = close[agreed] or reference.excusable(asked.number, len(asked.prompt) + agreed - 1)
        found.tokens.see(1.0, excusable)
        if not excusable:
            found.wrong.append(f"{asked.rid}: {ours.tolist()}, reference {theirs.tolist()}")
    elif len(ours) != len(theirs):
        found.wrong.append(f"{asked.rid}: {len(ours)} tokens, reference {len(theirs)}")
    elif output.finish_reason != (reason := "stop" if len(theirs) < asked.outputs else "length"):
        found.wrong.append(f"{asked.rid} ended by {output.finish_reason}, not {reason}")
    return agreed


def _compare_logprobs(
    found: Comparison, reference: Reference, asked: Asked, output: RequestOutput, agreed: int
) -> None:
    ours = output.logprobs
    assert ours is not None
    number, length = asked.number, len(asked.prompt)
    theirs = reference.logprobs(number)[:agreed].numpy()
    excusable = reference.excusable(number, length - 1 + np.arange(agreed))
    rows = np.arange(agreed)
    found.logprobs.see(np.abs(ours.tokens[:agreed] - theirs[rows, output.output_ids[:agreed]]), excusable)
    if len(ours.tokens) != len(output.output_ids):
        found.wrong.append(f"{asked.rid}: {len(ours.tokens)} log-probabilities of {len(output.output_ids)} tokens")
    if asked.top_logprobs:
        best = -np.sort(-theirs, axis=1)[:, : asked.top_logprobs]
        for (top_ids, top), row, values, excused in zip(ours.top[:agreed], theirs, best, excusable, strict=True):
            found.logprobs.see(np.abs(top - values), excused)
            found.logprobs.see(np.abs(top - row[top_ids]), excused)  # close ones may change places
    if asked.logprob_start >= 0:
        expected = reference.prompt_logprobs[number].copy()
        expected[: asked.logprob_start + 1] = np.nan
        if not np.array_equal(np.isnan(ours.prompt), np.isnan(expected)):
            found.wrong.append(f"{asked.rid}: log-probabilities of other prompt tokens than from {asked.logprob_start}")
        wanted = np.flatnonzero(~np.isnan(expected))
        found.logprobs.see(np.abs(ours.prompt - expected)[wanted], reference.excusable(number, wanted - 1))


def _compare_logits(
    found: Comparison, reference: Reference, comparable: NDArray[np.int64], batch: Batch, logits: Tensor
) -> None:
    """Rows that draw the next token of a context that the reference had too."""
    rows: list[tuple[int, Request, int]] = [
        (row, p.request, p.prefix_tokens + p.new_tokens) for row, p in enumerate(batch.prefills) if p.last
    ]
    if batch.decodes:
        rows += zip(range(len(batch.prefills), batch.rows), batch.decodes, batch.seq_lens.tolist(), strict=True)
    drawn = [(row, int(request.rid[1:]), length - request.prompt_tokens, length) for row, request, length in rows]
    known = [each for each in drawn if each[2] <= min(comparable[each[1]], STEPS - 1)]
    if known:
        ours, numbers, steps, lengths = map(list, zip(*known, strict=True))
        error = (logits[ours] - reference.logits[numbers, steps]).abs().amax(1)
        found.logits.see(error, reference.excusable(numbers, np.array(lengths) - 1))


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
    """Most rows of a step that decodes."""

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
        largest=max(batch.rows for batch in batches if batch.decodes),
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
