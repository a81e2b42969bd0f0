"""The scheduler: messages in, batches out, results in, outputs out. It decides; it knows neither time nor device.

Method names are SGLang's. One iteration of any loop is::

    handle_message*  ->  get_next_batch_to_run  ->  (the loop runs the batch)  ->  process_batch_result
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from testbed.batch import Batch, BatchShape, ForwardMode, Prefill, StepResult
from testbed.memory import KvMemory
from testbed.memory.slots import slots_needed
from testbed.messages import ControlOutput, GenerateRequest, GrammarReady, Message, RequestOutput
from testbed.metrics.recorder import Recorder
from testbed.request import ADVANCES, NEVER, NO_TOKENS, FinishReason, Request
from testbed.scenario.errors import InputError
from testbed.scenario.schema import EngineConfig
from testbed.scheduler.admission import PrefillAdder, Verdict
from testbed.scheduler.batching import STRATEGIES, BatchingStrategy
from testbed.scheduler.decisions import DecisionLog
from testbed.scheduler.disaggregation import DecodeSide, Ending, PrefillSide, Side, Terms
from testbed.scheduler.disaggregation.decode import preallocated_slots
from testbed.scheduler.disaggregation.rooms import wrong_half
from testbed.scheduler.dispatch import dispatch
from testbed.scheduler.grammar_queue import GrammarQueue
from testbed.scheduler.invariants import Invariants
from testbed.scheduler.logprobs import keep_logprobs
from testbed.scheduler.micro_batch import build_micro_batches, seats_of
from testbed.scheduler.policies import CACHE_AWARE, POLICIES, Policy, fcfs, with_priority
from testbed.scheduler.retraction import insert_by_arrival, retract_decode
from testbed.scheduler.running import RunningBatch

Checks = Literal["delta", "full"]
MAX_NEW_TOKENS_UNBOUNDED = 1 << 30
MOST_TOP_LOGPROBS = 128
"""SGLang's limit too."""


class Scheduler:
    """One engine's scheduler. ``kv_tokens`` is the KV capacity, ``context_length`` the model's limit on a sequence."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        kv_tokens: int,
        context_length: int,
        vocab_size: int,
        seed: int = 0,
        policy: Policy | None = None,
        strategy: BatchingStrategy | None = None,
        recorder: Recorder | None = None,
        checks: Checks = "delta",
        terms: Terms | None = None,
    ) -> None:
        """``policy`` and ``strategy`` replace the config's names by the user's own; ``checks``: full invariants at
        every step, or only now and then; ``terms``: those of an engine that prefills or decodes only."""
        self.config = config
        self.rules = config.rules
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.seed = seed
        self.memory = _build_memory(config, kv_tokens, context_length, terms)
        self.recorder = recorder or Recorder()
        self.micro_batches = build_micro_batches(config.parallel.pp, self.memory, self.recorder)
        """One for each stage of the pipeline; alone, one."""
        self.select_micro_batch(0)
        self.cache = self.memory.cache
        self.max_request_tokens = min(context_length - 1, self.memory.allocator.capacity_tokens - 1)
        """Prompt and output together never exceed this (specification B.11)."""
        self.max_running_requests = config.max_running_requests
        self.chunk_size = None if config.chunked_prefill_size == -1 else config.chunked_prefill_size
        self.waiting: list[Request] = []
        self.grammar_queue = GrammarQueue()
        self.chunked: Request | None = None
        """The one request whose prompt is half computed."""
        self.vacated: Batch | None = None
        """Decode steps that were not launched, because their retractions left nobody; the next launch reports them."""
        self.in_flight: list[Batch] = []
        self.requests: dict[str, Request] = {}
        """Every request that has not ended, by id."""
        self.on_step: Callable[[], None] | None = None
        """Called at every launch (progress bars)."""
        self.failed: list[Request] = []
        """Requests ended by a decision, not by a result; the loop sends their ends."""
        self.continued = False
        """Whether this step's prefill goes on with a half-computed prompt."""
        self.wakes: list[int] = []
        """Times at which a strategy wants to be asked again; the loop posts them as timers."""
        self._built: list[Batch] = []
        """Batches whose memory this decision has allocated."""
        self.steps = 0
        self.received = 0
        self.forward_sleep_ns = 0
        self._set_ratio(config)
        self.policy = self._choose_policy(policy)
        self.strategy = strategy or STRATEGIES[config.batching]()
        self.strategy_is_ours = strategy is None
        """All built-in strategies take a plain decode step when nobody waits; a user's own may not."""
        self.decision_log = DecisionLog()
        self.invariants = Invariants(self, every_step=checks == "full")
        self.prefill_side = PrefillSide(self, terms) if terms and terms.role == "prefill" else None
        self.decode_side = DecodeSide(self, terms) if terms and terms.role == "decode" else None
        self.side: Side | None = self.prefill_side or self.decode_side
        """What a scheduler has besides that is one half of a pair."""
        self.now_ns = 0
        self.fruitless = 0
        """Decisions in a row that found nothing to run where only a message or a result can change that."""
        self.idle_checked = True
        """No result has been processed since the last idle check."""
        self.admitted = self.matched_tokens = self.matched_in_policy = self.scanned = 0

    def _set_ratio(self, config: EngineConfig) -> None:
        """The share of its ``max_new_tokens`` that a request is expected to use: falls with every decode step, and
        starts afresh with every retraction and when the engine is idle (specification B.7)."""
        self.ratio_init = min(config.init_new_token_ratio * config.schedule_conservativeness, 1.0)
        self.ratio_min = min(self.ratio_init * config.min_new_token_ratio_factor, 1.0)
        self.ratio_decay = (self.ratio_init - self.ratio_min) / config.new_token_ratio_decay_steps
        self.new_token_ratio = self.ratio_init

    def _choose_policy(self, own: Policy | None) -> Policy:
        """The configured policy, or the user's ``own``; a cache-aware one without a cache is first come, first
        served."""
        config = self.config
        chosen = own or POLICIES[config.policy]
        if self.cache.disabled and chosen in CACHE_AWARE:
            chosen = fcfs
        if not config.priority:
            return chosen
        return with_priority(chosen, config.low_priority_values_first, config.retract_to == "arrival_rank")

    @property
    def max_prompt_tokens(self) -> int:
        """A prompt is shorter than this (SGLang's reserve, specification B.11)."""
        return self.max_request_tokens - 5

    @property
    def free_and_evictable_tokens(self) -> int:
        """What an admission may count on."""
        return self.memory.free_and_evictable_tokens

    # -- messages ---------------------------------------------------------------------------------------------------

    @property
    def can_build_batch(self) -> bool:
        """Whether a batch can be built without another message or result, or the idle check that follows the last one
        is still to be made: a loop that blocked before it would carry the estimate of output over the pause."""
        if self.fruitless < len(self.micro_batches):
            if self.running.requests or self.waiting or self.chunked or self.last_batch or not self.idle_checked:
                return True
            if any(other.running.requests or other.last_batch for other in self.micro_batch.others):
                return True
        return self.side is not None and self.side.ready

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is in flight."""
        held = self.memory.allocator.quarantined_pages
        return not (self.requests or self.in_flight or self.chunked or self.waiting or held)

    def handle_message(self, now_ns: int, message: Message) -> list[RequestOutput | ControlOutput]:
        """Dispatch one message; what has to be sent at once is returned. A message never raises: a bad one is
        refused."""
        self.now_ns = now_ns
        self.fruitless = 0
        return dispatch(self, message)

    def add_request(self, source: GenerateRequest) -> list[RequestOutput | ControlOutput]:
        """Accept a request into the waiting queue, or refuse it."""
        refusal = self._refusal(source)
        if refusal is not None:
            status, message = refusal
            request = Request(source, NEVER, NO_TOKENS, 0)
            request.prompt_tokens = len(source.prompt)
            request.queued_ns = self.now_ns
            request.finish_reason, request.message, request.status = FinishReason.ERROR, message, status
            self.recorder.count("refused")
            if self.side is not None and source.pair is not None:
                self.side.refused(source.pair, message, status)
            if source.rid not in self.requests:  # the record of a duplicate id would overwrite the first one's
                self.recorder.ended(request, 0, self.now_ns)
            return [self.output_of(request)]
        room = self.max_request_tokens - len(source.prompt) - 1
        wanted = MAX_NEW_TOKENS_UNBOUNDED if source.max_new_tokens is None else source.max_new_tokens
        request = Request(source, self.received, source.prompt.ids(self.vocab_size), min(wanted, room))
        request.queued_ns = self.now_ns
        self.received += 1
        self.requests[source.rid] = request
        if self.side is not None and source.pair is not None:
            self.side.add(request, source.pair)
        elif request.grammar is None:
            self.waiting.append(request)
        else:
            self.grammar_queue.add(request)
        return []

    def grammar_ready(self, ready: GrammarReady) -> list[RequestOutput | ControlOutput]:
        """The request that waits for it may be scheduled, as if it had waited in the queue; or it ends. No effect when
        it has been aborted meanwhile."""
        request = self.grammar_queue.take(ready.rank)
        if request is None:
            return []
        if not ready.error:
            insert_by_arrival(self.waiting, request)
            return []
        self._end(request, FinishReason.ERROR, ready.error, ready.status)
        self.recorder.ended(request, 0, self.now_ns)
        return [self.output_of(request)]

    def _refusal(self, source: GenerateRequest) -> tuple[int, str] | None:
        """(status, reason) when a request cannot be served at all."""
        limit = self.max_prompt_tokens
        if source.rid in self.requests:
            return 400, f"a request with the id {source.rid!r} is being served"
        if len(source.prompt) == 0:
            return 400, "the prompt is empty"
        if len(source.prompt) >= limit:
            return 400, f"the prompt has {len(source.prompt)} tokens; this engine takes fewer than {limit}"
        if source.max_new_tokens is not None and source.max_new_tokens < 0:
            return 400, "max_new_tokens is negative"
        wrong = source.sampling.problem(self.vocab_size, source.max_new_tokens)
        if wrong is not None:
            return 400, wrong
        if source.grammar is not None and source.sampling.min_new_tokens:
            return 400, "min_new_tokens cannot be combined with a grammar, which says where the output ends"
        if source.logprob_start >= len(source.prompt) or source.logprob_start < -1:
            return 400, f"logprob_start is {source.logprob_start}; the prompt has {len(source.prompt)} tokens"
        if not 0 <= source.top_logprobs <= MOST_TOP_LOGPROBS:
            return 400, f"top_logprobs is {source.top_logprobs}; it must lie in [0, {MOST_TOP_LOGPROBS}]"
        if source.pair is not None or self.side is not None:
            wrong = wrong_half(self.side, source)
            if wrong is not None:
                return 400, wrong
        most = self.config.max_queued_requests
        queued = len(self.waiting) + len(self.grammar_queue) + (self.side.queued if self.side is not None else 0)
        if most is not None and queued + 1 > most:
            return 503, "The request queue is full."
        return None

    def abort(self, rid: str) -> list[RequestOutput | ControlOutput]:
        """End a request wherever it is; unknown and ended ids have no effect. A launched batch that contains it is not
        changed: its row's result is dropped."""
        request = self.requests.get(rid)
        if request is None:
            return []
        if self.side is not None:
            self.side.give_up(request, Ending(FinishReason.ABORT, "aborted", 499))
            self.recorder.count("aborts")
            return []
        if request.slot == NEVER:
            if self.grammar_queue.take(request.rank) is None:
                self.waiting.remove(request)
            request.output_ids = request.fill_ids[request.prompt_tokens :]
        else:
            if request is self.chunked:
                self.chunked = None
            self._release(request)
        self._end(request, FinishReason.ABORT, "aborted", 499)
        self.end_pause(request, self.now_ns)
        self.count_extra_rows([request])
        self.recorder.ended(request, len(request.output_ids), self.now_ns)
        self.recorder.count("aborts")
        return [self.output_of(request)]

    @staticmethod
    def output_of(request: Request) -> RequestOutput:
        """The final message of a request that has ended."""
        return RequestOutput(
            request.rid,
            str(request.finish_reason),
            request.message,
            request.status,
            request.prompt_tokens,
            max(request.cached_tokens, 0),
            request.output_ids,
            request.logprobs,
        )

    # -- micro-batches ------------------------------------------------------------------------------------------------

    def select_micro_batch(self, place: int) -> None:
        """What follows, decision or result, is about this one: 0 .. stages - 1. ``running`` is its running batch."""
        self.micro_batch = self.micro_batches[place]
        self.running = self.micro_batch.running

    @property
    def last_batch(self) -> Batch | None:
        """The last decision, of this micro-batch."""
        return self.micro_batch.last_batch

    def running_of(self, request: Request) -> RunningBatch:
        """The running batch whose row ``request`` is; any, if it is none."""
        return self.micro_batches[request.joined // ADVANCES].running

    def outputs_known(self, request: Request) -> int:
        """Output tokens of ``request`` whose ids are known."""
        return request.outputs_known(self.running_of(request).done)

    def others_run(self) -> bool:
        """Whether requests that are in no row of this micro-batch hold KV, which their ends will free."""
        if self.decode_side is not None and self.decode_side.holds_memory:
            return True
        return any(other.rows or other.joining() for other in self.micro_batch.others)

    def everybody_running(self) -> list[Request]:
        """The running requests, then those of other micro-batches."""
        others = (request for other in self.micro_batch.others for request in other.open_requests())
        return [*self.running.requests, *others]

    def remaining_outputs(self, clip: int) -> int:
        """Tokens that all running requests may still generate, each at most ``clip``: they share the memory."""
        own = self.running.remaining_outputs(clip) if self.running.requests else 0
        return own + sum(other.remaining_outputs(clip) for other in self.micro_batch.others)

    def _seats_in_micro_batch(self) -> int:
        """Requests that this one may have more, and all together: a prompt whose chunks travelled on sits in another
        micro-batch than the one that had a seat for it."""
        share = seats_of(self.max_running_requests, len(self.micro_batches))
        slots = self.memory.slots
        held = slots.count - slots.available - (self.chunked is not None)
        return min(share - len(self.running), share * len(self.micro_batches) - held)

    # -- decision -----------------------------------------------------------------------------------------------------

    def get_next_batch_to_run(self, now_ns: int) -> Batch | None:
        """The next step, with its memory; None when there is nothing to run now."""
        self.now_ns = now_ns
        self.admitted = self.matched_tokens = self.matched_in_policy = self.scanned = 0
        micro_batch, running = self.micro_batch, self.running
        full_before = running.is_full
        last = micro_batch.last_batch
        if self.chunked is not None:
            self.memory.publish(self.chunked)
        if last is not None and last.prefills and self.prefill_side is None:
            self._merge_last_batch(last)
        if running.finished_rows and self.rules.admission == "every_step":
            running.filter_finished()
        rows_before = len(running.requests)
        self._built.clear()
        batch = self.strategy.next_batch(self)
        if batch is None and self.vacated is not None and not self.in_flight:
            batch = self.strategy.next_batch(self)  # what the retracted held is free now, and no result will tell
        micro_batch.last_batch = batch
        if self._built and (len(self._built) > 1 or self._built[0] is not batch):
            raise InputError(
                f"the strategy built {len(self._built)} batches, which hold memory, and did not return just that one",
                where="engine.batching",
                remedy="return what new_prefill_batch() or decode_batch() gave, or make one step of both with join()",
            )
        if batch is not None:
            self._launch(batch)
        else:
            # Under SGLang's latch this very decision may have cleared the latch, or dropped rows that its budgets still
            # counted: then the next one can succeed.
            opened = len(running.requests) < rows_before or (full_before and not running.is_full)
            in_vain = not self.in_flight and not (opened and (self.waiting or self.chunked is not None))
            self.fruitless = self.fruitless + 1 if in_vain else 0
        return batch

    def _merge_last_batch(self, last: Batch) -> None:
        """The last step's prefills join the running batch, without those that ended or have more chunks to go."""
        running = self.running
        joining = [
            prefill.request
            for prefill in last.prefills
            if prefill.last and prefill.request.finish_reason is None and prefill.request.max_new_tokens > 0
        ]
        if self.rules.admission == "when_batch_shrinks":
            self._clear_latch(last, len(joining))
        if joining:
            running.merge(joining, front=last.decodes_behind)

    def _clear_latch(self, last: Batch, joining: int) -> None:
        """``batch_is_full`` belongs to SGLang's running batch object: a prefill that becomes the running batch (always
        after a mixed step) brings a fresh flag; one that lost rows clears it."""
        running = self.running
        if last.mode is ForwardMode.MIXED:
            shrank = joining < len(last.prefills) or running.finished_rows > 0
            running.filter_finished()
            fresh = joining + len(running) > 0
        else:
            shrank = joining < len(last.prefills)
            fresh = joining > 0 and not running.requests
        if shrank or fresh:
            running.is_full = False

    def wake_at(self, when_ns: int) -> None:
        """For strategies that wait: ask again at ``when_ns`` (see ``now_ns``), even if no message arrives."""
        self.wakes.append(when_ns)

    def new_prefill_batch(self, token_budget: int | None, mixed_rows: int = 0) -> Batch | None:
        """A prefill of at most ``token_budget`` tokens (None: prompts are not cut), chosen by policy and budgets."""
        running = self.running
        if self.config.priority:
            running.is_full = False  # a newcomer may be more important than who was refused (SGLang 0.5.3)
        if self.chunked is None and (not self.waiting or not self._may_admit(token_budget)):
            return None
        seats = self.max_running_requests - len(running)
        if self.micro_batch.others:
            seats = self._seats_in_micro_batch()
        elif self.side is not None:  # whose KV is on its way holds a slot, too
            seats = min(seats, self.memory.slots.available + (self.chunked is not None))
        if seats <= 0 and self.chunked is None:
            running.is_full = True
            return None
        self.scanned = len(self.waiting)
        if self.waiting:
            self._order_waiting()
        adder = PrefillAdder(self, token_budget, mixed_rows)
        self.continued = self.chunked is not None
        if self.chunked is not None:
            adder.add_chunked(self.chunked)
        for request in self.waiting:
            if len(adder.prefills) >= seats:
                running.is_full = True
                break
            verdict = adder.add(request)
            if verdict is not Verdict.CONTINUE:
                if verdict is Verdict.NO_TOKENS:
                    running.is_full = True
                break
        if not adder.prefills:
            return None
        self._take_from_waiting(adder)
        return self._prepare_for_extend(adder.prefills)

    def _order_waiting(self) -> None:
        """Let the policy sort the queue in place."""
        before = len(self.waiting)
        answer: object = self.policy(self.waiting, self)
        if answer is not None or len(self.waiting) != before:
            raise InputError(
                "the policy must sort the waiting list in place: it "
                + ("returned something" if answer is not None else f"left {len(self.waiting)} of {before} requests"),
                where="engine.policy",
                remedy="use waiting.sort(key=...) and return nothing",
            )

    def _may_admit(self, token_budget: int | None) -> bool:
        """A test of constant cost before the exact one. With the latch: whether it is open. Without: whether the head
        of a first-come queue could possibly fit, which spares a full queue the walk at every step."""
        if self.rules.admission == "when_batch_shrinks":
            return not self.running.is_full
        if token_budget is not None and token_budget <= 0:
            return False
        if self.policy is not fcfs or not self.running.requests:
            return True
        return self.memory.free_and_evictable_tokens > 0

    def _take_from_waiting(self, adder: PrefillAdder) -> None:
        """Selected requests leave the queue; a newly cut one becomes the chunked request."""
        selected = {prefill.request.rank for prefill in adder.prefills}
        fresh = [p.request for p in adder.prefills if p.request is not self.chunked]
        self.admitted = len(fresh)
        self.matched_tokens = adder.matched_tokens
        if fresh == self.waiting[: len(fresh)]:
            del self.waiting[: len(fresh)]
        else:
            self.waiting = [request for request in self.waiting if request.rank not in selected]
        self.chunked = adder.chunked

    def _prepare_for_extend(self, prefills: list[Prefill]) -> Batch:
        """Allocate slots and pages of a prefill."""
        batch = Batch(ForwardMode.EXTEND, prefills)
        p = self.config.page_size
        needed = sum(prefill.new_tokens for prefill in prefills) + (len(prefills) * p if p > 1 else 0)
        batch.evicted_tokens = self.memory.make_room(needed)
        for request, prefix, new_tokens, _ in prefills:
            if request.slot == NEVER:
                self.memory.open(request)
                request.sampled = False
                if request.first_scheduled_ns == NEVER:
                    request.first_scheduled_ns = self.now_ns
                    request.cached_tokens = prefix
            batch.pages.append(self.memory.extend(request, new_tokens))
            request.pending_prefills += 1
        self._built.append(batch)
        return batch

    def decode_batch(self) -> Batch | None:
        """One token for every running request; retracts some first when memory does not suffice."""
        running, memory = self.running, self.memory
        before = len(running.requests)
        if running.finished_rows:
            running.filter_finished()
        if not running.requests:
            running.is_full = False
            return None
        batch = Batch(ForwardMode.DECODE)
        pages = running.pages_needed()
        if memory.allocator.free_pages < pages:
            batch.evicted_tokens = memory.make_room(pages * memory.page_size)
        if memory.allocator.free_pages < pages:
            retract_decode(self, batch)
            if not running.requests:
                self._report_vacated(batch)
                self.vacated = batch
                return None
        else:
            ratio = self.new_token_ratio - self.ratio_decay
            self.new_token_ratio = ratio if ratio > self.ratio_min else self.ratio_min
        if len(running.requests) < before:
            running.is_full = False
        self._advance(batch)
        self._built.append(batch)
        return batch

    def _advance(self, batch: Batch) -> None:
        """Give each running row its next token's room, and the rows to ``batch``."""
        running, memory = self.running, self.memory
        if memory.evict_whole_need:  # SGLang asks for a page a row, whether the row opens one or not
            batch.evicted_tokens += memory.make_room(len(running.requests) * memory.page_size)
        memory.owned_pages += running.decode_into(batch)

    def mix_with_running(self, batch: Batch) -> Batch:
        """Let the running requests decode in a prefill's step, if memory holds one more token for each."""
        running = self.running
        running.filter_finished()
        if running.requests:
            needed = running.pages_needed() * self.config.page_size
            batch.evicted_tokens += self.memory.make_room(needed)
            if self.memory.allocator.available_tokens >= needed:
                self._advance(batch)
                batch.mode = ForwardMode.MIXED
                batch.decodes_behind = True
        return batch

    def join(self, prefill: Batch, decode: Batch) -> Batch:
        """One step of a prefill and a decode that both have their memory."""
        self._built.remove(prefill)
        decode.mode = ForwardMode.MIXED
        decode.prefills = prefill.prefills
        decode.pages = prefill.pages + decode.pages
        decode.evicted_tokens += prefill.evicted_tokens
        return decode

    def _launch(self, batch: Batch) -> None:
        """Number, shape, log and check a decided batch."""
        batch.index = self.steps
        self.steps += 1
        if self.vacated is not None:
            self._report_vacated(batch)
        slots = self.memory.slots
        if slots.rewritten:
            batch.rewritten, slots.rewritten = slots.rewritten, []
        prefills, running, allocator = batch.prefills, self.running, self.memory.allocator
        rows = len(batch.decodes)
        if prefills:
            new, prefix = tuple([p.new_tokens for p in prefills]), tuple([p.prefix_tokens for p in prefills])
        else:
            new = prefix = ()
        if rows:
            batch.shape = BatchShape(new, prefix, rows, running.context_tokens(), running.context_max())
        else:
            batch.shape = BatchShape(new, prefix)
        rows_running = len(running.requests)
        for other in self.micro_batch.others:
            rows_running += other.rows
        batch.decided = (
            rows_running,
            len(self.waiting),
            allocator.free_pages * allocator.page_size,
            self.cache.evictable_tokens,
        )
        batch.new_token_ratio = self.new_token_ratio
        if self.grammar_queue.open:
            drawing = [*(prefill.request for prefill in prefills if prefill.last), *batch.decodes]
            batch.has_grammar = any(request.grammar is not None for request in drawing)
        self.in_flight.append(batch)
        self.decision_log.append(batch)
        self.invariants.after_decision(batch)
        if self.on_step is not None:
            self.on_step()

    def _report_vacated(self, batch: Batch) -> None:
        """What steps did that were not launched goes into the record of ``batch``."""
        if self.vacated is not None:
            batch.retracted = [*self.vacated.retracted, *batch.retracted]
            batch.evicted_tokens += self.vacated.evicted_tokens
            self.vacated = None

    # -- results ------------------------------------------------------------------------------------------------------

    def process_batch_result(self, batch: Batch, result: StepResult) -> list[Request]:
        """Apply a result; results come in launch order. Returns the requests that ended."""
        assert self.in_flight and self.in_flight[0] is batch, "results are applied in launch order"
        assert batch is self.micro_batch.last_batch or not self.micro_batch.others, "the result of another micro-batch"
        self.in_flight.pop(0)
        self.fruitless, self.idle_checked = 0, False
        ended, self.failed = self.failed, []
        if result.invalid:
            self._end_invalid(batch, result, ended)
        if result.logprobs is not None:
            keep_logprobs(batch, result.logprobs)
        if batch.prefills:
            if self.prefill_side is not None:
                self.prefill_side.process_prefills(batch, result)
            else:
                self._process_prefills(batch, result, ended)
        if batch.decodes:
            self._process_decodes(batch, result, ended)
        if self.memory.allocator.quarantined_pages:
            self.memory.allocator.reap(batch.index)
        if ended and self.in_flight:
            self.count_extra_rows(ended)
        return ended

    def _process_prefills(self, batch: Batch, result: StepResult, ended: list[Request]) -> None:
        for row, (request, _, _, last) in enumerate(batch.prefills):
            request.pending_prefills -= 1
            if not last or request.finish_reason is not None or request.slot == NEVER or request.pending_prefills:
                continue  # not its end, ended, retracted, or retracted and admitted again
            request.sampled = True
            self.memory.slots.outputs[request.slot, 0] = result.token_ids[row]
            if request.old_outputs + 1 >= request.max_new_tokens:
                self.finish(request, FinishReason.LENGTH, ended)
            elif row in result.stopped:
                self.finish(request, FinishReason.STOP, ended)
            else:
                self.memory.publish(request)

    def _process_decodes(self, batch: Batch, result: StepResult, ended: list[Request]) -> None:
        running = self.running
        first = len(batch.prefills)
        running.commit(batch, result.token_ids[first:] if first else result.token_ids)
        advance = batch.advance
        if advance >= running.next_finish:
            for row in np.flatnonzero(batch.finish_at == advance).tolist():
                request = batch.decodes[row]
                if request.finish_reason is None and request.in_running:
                    self.finish(request, FinishReason.LENGTH, ended)
        for row in result.stopped:
            if row >= first:
                request = batch.decodes[row - first]
                if request.finish_reason is None and request.in_running:
                    self.finish(request, FinishReason.STOP, ended)

    def _end_invalid(self, batch: Batch, result: StepResult, ended: list[Request]) -> None:
        """Requests without a token end with an error, before anything of the result is kept."""
        first = len(batch.prefills)
        for row in result.invalid:
            if row < first:
                request, _, _, last = batch.prefills[row]
                dropped = not last or request.slot == NEVER or request.pending_prefills != 1
            else:
                request = batch.decodes[row - first]
                dropped = not request.in_running
            if request.finish_reason is None and not dropped:
                why, status = "the model's logits leave no token to choose", 500
                if request.grammar is not None:
                    why, status = "the grammar and the model's logits leave no token to choose", 400
                batch.extra_rows += row >= first
                if self.prefill_side is not None:
                    self.prefill_side.give_up(request, Ending(FinishReason.ERROR, why, status))
                else:
                    self.finish(request, FinishReason.ERROR, ended, why, status)

    def finish(
        self, request: Request, reason: FinishReason, ended: list[Request], message: str = "", status: int = 200
    ) -> None:
        """A result has ended the request."""
        self._release(request)
        self._end(request, reason, message, status)
        ended.append(request)

    def allocated_tokens(self, request: Request) -> int:
        """KV tokens that ``request`` holds room for."""
        if request.in_running:
            return len(request.fill_ids) + self.running_of(request).advance - request.joined
        return request.kv_tokens

    def _release(self, request: Request) -> None:
        """An ending request gives its KV back: what is computed and known to the tree, the rest to the free list."""
        allocated = self.allocated_tokens(request)
        if not request.sampled:
            request.output_ids = request.fill_ids[request.prompt_tokens :]
            self.memory.drop(request, allocated)
            return
        fresh = self.outputs_known(request) - request.old_outputs
        outputs = self.memory.slots.outputs[request.slot, :fresh]
        tokens = np.concatenate((request.fill_ids, outputs))
        request.output_ids = tokens[request.prompt_tokens :][: request.max_new_tokens].copy()
        fence = NEVER
        if self.rules.over_allocated == "free_at_result" and self.in_flight:
            fence = self.in_flight[-1].index
        self.memory.release(request, tokens[:-1], allocated, fence)
        if fresh > 1:
            request.segments.append((request.joined, fresh - 1))

    def _end(self, request: Request, reason: FinishReason, message: str, status: int) -> None:
        request.finish_reason = reason
        request.message = message
        request.status = status
        if request.in_running:
            self.running_of(request).finished_rows += 1
        self.requests.pop(request.rid, None)
        if request.grammar is not None:
            self.grammar_queue.ended(request)
        self.invariants.ended(request)

    def end(self, request: Request, ending: Ending) -> None:
        """A decision ends the request, wherever it is; its output goes out with the next messages."""
        if request.slot == NEVER:
            request.output_ids = request.fill_ids[request.prompt_tokens :]
        else:
            self._release(request)
        self._end(request, *ending)
        self.end_pause(request, self.now_ns)
        self.count_extra_rows([request])
        self.failed.append(request)

    def count_extra_rows(self, ended: list[Request]) -> None:
        """Rows of launched batches whose token will be dropped, because the request ended meanwhile."""
        for batch in self.in_flight:
            if batch.decodes:
                batch.extra_rows += sum(request.in_running and _is_row(request, batch) for request in ended)

    # -- after the outputs were sent ---------------------------------------------------------------------------------

    def outputs_sent(self, batch: Batch, result: StepResult, ended: list[Request], sent_ns: int) -> None:
        """Record that the batch's tokens, and the ends of ``ended``, were sent at ``sent_ns``."""
        recorder = self.recorder
        for request, _, _, last in batch.prefills:
            if last and request.sampled and request.max_new_tokens and self.prefill_side is None:
                self.token_sent(request, sent_ns)
        if batch.decodes:
            self.micro_batch.times.append(sent_ns)
        for request in ended:
            recorder.ended(request, len(request.output_ids), sent_ns)
        recorder.step(batch, result, sent_ns)
        if self.invariants.every_step:
            self.invariants.full()

    def token_sent(self, request: Request, sent_ns: int) -> None:
        """The first token since (re-)admission."""
        self.end_pause(request, sent_ns)
        if request.first_token_ns == NEVER:
            request.first_token_ns = sent_ns
        request.segments.append((-1 - sent_ns, 1))

    @staticmethod
    def end_pause(request: Request, now_ns: int) -> None:
        """The pause of a retracted request ends: with its next token, or with itself."""
        if request.retracted_at_ns == NEVER:
            return
        pause = now_ns - request.retracted_at_ns
        request.retracted_at_ns = NEVER
        request.retracted_ns += pause
        if request.first_token_ns == NEVER:
            request.retracted_before_first_ns += pause

    def on_idle(self) -> None:
        """The loop found nothing to do: the ratio starts afresh, and every page is accounted for (specification
        A.9)."""
        self.idle_checked = True
        self.new_token_ratio = self.ratio_init
        self.invariants.when_idle()

    def flush_cache(self) -> bool:
        """Empty the prefix cache; refused, without effect, unless nothing waits, runs or is in flight."""
        if not self.idle:
            return False
        for one in self.micro_batches:
            one.running.filter_finished()
            one.last_batch = None
        self.memory.cache.clear()
        self.memory.allocator.clear()
        return True


def _is_row(request: Request, batch: Batch) -> bool:
    """Whether a running request decodes in a launched batch: one of its micro-batch, since it joined."""
    return request.joined < batch.advance and request.joined // ADVANCES == batch.advance // ADVANCES


def _build_memory(config: EngineConfig, kv_tokens: int, context_length: int, terms: Terms | None) -> KvMemory:
    """The KV memory that ``config`` asks for, and the role. Raises InputError for a chunk smaller than a page."""
    if config.chunked_prefill_size != -1 and config.chunked_prefill_size < config.page_size:
        raise InputError(
            f"a prefill of {config.chunked_prefill_size} tokens does not fill a page of {config.page_size}: "
            "no prompt would be cut",
            where="engine.chunked_prefill_size",
            remedy="give at least engine.page_size, or -1",
        )
    stages = config.parallel.pp
    decodes_only = terms is not None and terms.role == "decode"
    slots = slots_needed(stages * seats_of(config.max_running_requests, stages), kv_tokens, config.page_size)
    return KvMemory(
        kv_tokens,
        page_size=config.page_size,
        slots=slots + (preallocated_slots(config.max_running_requests) if decodes_only else 0),
        context_tokens=min(context_length, kv_tokens) + 1,
        prefix_cache="chunk" if decodes_only else config.prefix_cache,
        eviction=config.eviction,
        evict_whole_need=config.rules.evict_amount == "whole_need",
    )
