"""The model on one device: takes a step's arrays, gives its tokens.

One step, on the device::

    page table <- new pages
    token ids  <- the host (prompts), the relay (what the step before drew)
    hidden     <- the decoder, through the attention backend and the paged KV
    logits     <- hidden of each row's last token
    token      <- sampler (or the oracle's), into the relay and to the host

A decode step up to the logits is a CUDA graph where there is one. Sampling is a second phase: at once, or with a call
of its own when a grammar's mask is still to come.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from testbed.batch import largest_captured
from testbed.engine.backends.base import AttentionPlan, Backend, DecodeRows, ExtendRows
from testbed.engine.faults import device_errors
from testbed.engine.graphs import DecodeGraphs
from testbed.engine.inputs import ARRAYS, SamplingNeeds, StepInputs, StepOutputs
from testbed.engine.kv_cache import KvCache, TokenRelay
from testbed.engine.models.decoder import Decoder
from testbed.engine.options import DeviceInfo, EngineOptions
from testbed.engine.queue import Queue, Ticket
from testbed.engine.sampler import Sampled, Sampler, with_logprobs
from testbed.memory.slots import slots_needed

PROMPT_LOGITS_ROWS = 512
"""Positions whose logits exist at once while log-probabilities of a prompt are computed."""

WARM_NEEDS = (
    SamplingNeeds(greedy=False),
    SamplingNeeds(greedy=False, filters=True),
    SamplingNeeds(logprobs=True, top_logprobs=1),
)
"""Ways of sampling whose kernels a run may need in its middle; not penalties, whose counts take memory from the first
request on that wants them."""


class ModelRunner:
    """One decoder with its KV, its sampler and its queue: public parts, for those who measure them one by one."""

    def __init__(
        self,
        decoder: Decoder,
        backend: Backend,
        queue: Queue,
        info: DeviceInfo,
        options: EngineOptions,
        device: torch.device,
    ) -> None:
        self.info = info
        self.decoder = decoder
        self.backend = backend
        self.queue = queue
        self.page_size = options.page_size
        self.spare_slot = slots_needed(options.max_running_requests, info.kv_tokens, options.page_size)
        slots = self.spare_slot + 1
        self._table = torch.zeros((slots, info.table_width), dtype=torch.int32, device=device)
        dtype: torch.dtype = getattr(torch, options.dtype)
        self.kv = KvCache(decoder.config.spec, info.kv_tokens, options.page_size, dtype, device)
        self._relay = TokenRelay(slots, device)
        self.sampler = Sampler(
            self.spare_slot, info.vocab_size, device, info.eos_token_ids, fused=info.backend == "triton"
        )
        self._longest = min(info.context_length, info.kv_tokens)
        self.graphs: DecodeGraphs | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # weights and buffers were filled on the default stream
        if options.cuda_graph and device.type == "cuda" and info.backend == "triton":
            memory_bytes = torch.cuda.get_device_properties(device).total_memory
            largest = min(options.cuda_graph_max_bs or largest_captured(memory_bytes), options.max_running_requests)
            with queue.computing():
                self.graphs = DecodeGraphs(self._decode, largest, self.spare_slot, device)

    # -- a step ---------------------------------------------------------------------------------------------------

    def launch(self, inputs: StepInputs) -> RunningStep:
        """Queue a step; on CUDA, returns before it is computed."""
        with device_errors():
            staged = dict(zip(ARRAYS, self.queue.stage(inputs.arrays()), strict=True))
            step = RunningStep(self, inputs, staged)
            with self.queue.computing():
                self._compute(step)
        if not inputs.defer_sampling:
            step.sample(None)
        return step

    def _compute(self, step: RunningStep) -> None:
        """Everything up to the logits."""
        inputs, staged = step.inputs, step.staged
        self.queue.begin()
        if len(inputs.places):
            self._table.view(-1)[staged["places"]] = staged["pages"]
        if len(inputs.prefill_slots):
            step.logits = self._extend(inputs, staged, step)
        elif self.graphs is not None and self.graphs.fits(len(inputs.decode_slots)):
            step.graph = True
            step.logits = self.graphs.replay(staged["decode_slots"], staged["positions"])
        else:
            step.logits = self._decode(staged["decode_slots"], staged["positions"])

    def _decode(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Logits of decoding rows, float32 [b, vocab]. Free of the host: this is what a CUDA graph holds."""
        token_ids = self._relay.take(slots, positions)
        plan = AttentionPlan(self._table, self.page_size, decode=DecodeRows(slots, positions + 1))
        return self.decoder.logits(self._forward(token_ids, slots, positions, plan))

    def _extend(self, inputs: StepInputs, staged: dict[str, Tensor], step: RunningStep) -> Tensor:
        """Logits of the last token of each prefilling row, then of the decoding rows: float32 [n + b, vocab]."""
        token_ids, slots, positions = staged["token_ids"], staged["token_slots"], staged["token_positions"]
        new_tokens = len(inputs.token_ids)
        plan = AttentionPlan(
            self._table,
            self.page_size,
            extend=ExtendRows(
                slots=staged["prefill_slots"],
                starts=staged["starts"],
                prefix_lens=staged["prefix_lens"],
                longest=int(np.diff(inputs.starts).max()),
                tokens=new_tokens,
            ),
        )
        last = staged["starts"][1:] - 1
        if len(inputs.decode_slots):
            decode_slots, decode_positions = staged["decode_slots"], staged["positions"]
            token_ids = torch.cat((token_ids, self._relay.take(decode_slots, decode_positions)))
            slots = torch.cat((slots, decode_slots))
            positions = torch.cat((positions, decode_positions))
            plan.decode = DecodeRows(decode_slots, decode_positions + 1)
            behind = torch.arange(new_tokens, len(token_ids), dtype=torch.int32, device=last.device)
            last = torch.cat((last, behind))
        hidden = self._forward(token_ids, slots, positions, plan)
        if len(inputs.prompt_targets):
            step.prompt_logprobs = self._prompt_logprobs(hidden, staged["prompt_targets"])
        return self.decoder.logits(hidden[last])

    def _forward(self, token_ids: Tensor, slots: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """Final hidden states, [t, hidden]; keys and values of these tokens go to their pages."""
        p = self.page_size
        pages = self._table[slots, positions // p].to(torch.int64)
        self.backend.prepare(plan)
        return self.decoder.forward(token_ids, positions, pages * p + positions % p, self.kv.layers, plan)

    def _prompt_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of ``targets``, float32 [T], NaN where there is none; a block of positions at a time, since
        the logits of a long prompt are gigabytes."""
        found = []
        for rows, wanted in zip(hidden.split(PROMPT_LOGITS_ROWS), targets.split(PROMPT_LOGITS_ROWS), strict=False):
            logprobs = torch.log_softmax(self.decoder.logits(rows[: len(wanted)]), dim=-1)
            chosen = logprobs.gather(1, wanted.clamp(min=0).to(torch.int64)[:, None])[:, 0]
            found.append(torch.where(wanted < 0, torch.nan, chosen))
        return torch.cat(found)

    def sample(self, step: RunningStep, bitmask: NDArray[np.int32] | None) -> None:
        """The second phase: draw, leave the tokens in the relay, send them to the host."""
        inputs, staged = step.inputs, step.staged
        with device_errors(), self.queue.computing():
            if inputs.sampling:
                self.sampler.update(inputs.sampling)
            slots, positions, host_slots = self._rows(inputs, staged)
            mask = None if bitmask is None else self.queue.send(bitmask)
            assert step.logits is not None
            sampled = self.sampler.sample(step.logits, slots, positions, inputs.needs, host_slots, mask)
            if len(inputs.forced):
                sampled = self._forced(step.logits, staged["forced"], inputs.needs)
            token_ids = sampled.token_ids
            self._relay.put(slots, positions, token_ids)
            if inputs.needs.penalties:
                self.sampler.count(slots, token_ids)
            step.fetched = self.queue.fetch([token_ids, *_wanted(sampled), *_present(step.prompt_logprobs)])
            step.has_logprobs = sampled.logprobs is not None
            step.ticket = self.queue.end()

    @staticmethod
    def _forced(logits: Tensor, token_ids: Tensor, needs: SamplingNeeds) -> Sampled:
        """The oracle's tokens, as if they had been drawn."""
        return with_logprobs(logits, token_ids, needs.top_logprobs) if needs.logprobs else Sampled(token_ids)

    def _rows(self, inputs: StepInputs, staged: dict[str, Tensor]) -> tuple[Tensor, Tensor, NDArray[np.int32]]:
        """Slot and position of the token that each row draws; the slots for the host too."""
        slots, positions = staged["decode_slots"], staged["positions"] + 1
        if not len(inputs.prefill_slots):
            return slots, positions, inputs.decode_slots
        ends = staged["prefix_lens"] + staged["starts"].diff()
        host_slots = np.concatenate((inputs.row_slots, inputs.decode_slots))
        return torch.cat((staged["row_slots"], slots)), torch.cat((ends, positions)), host_slots

    # -- before the first request -----------------------------------------------------------------------------------

    def warm_up(self, lengths: Sequence[int]) -> None:
        """Run a prefill of each of these lengths, with and without a prefix, alone and beside a decoding row, and every
        way of sampling, on the spare slot: kernels are compiled now and not under a request."""
        for tokens in lengths:
            for prefix in (0, 16):
                self.launch(self._spare_prefill(tokens, prefix)).wait()
                beside = self._spare_prefill(tokens, prefix)
                beside.decode_slots, beside.positions = beside.prefill_slots, beside.prefix_lens + np.int32(tokens)
                self.launch(beside).wait()
        for needs in WARM_NEEDS:
            inputs = self._spare_prefill(1, 0)
            inputs.needs = needs
            self.launch(inputs).wait()

    def _spare_prefill(self, tokens: int, prefix: int) -> StepInputs:
        """A prefill of the slot that nobody has."""
        spare = np.array([self.spare_slot], dtype=np.int32)
        return StepInputs(
            -1,
            token_ids=np.zeros(tokens, np.int32),
            token_slots=np.repeat(spare, tokens),
            token_positions=(np.arange(tokens, dtype=np.int32) + prefix) % self._longest,
            prefill_slots=spare,
            prefix_lens=np.array([prefix], np.int32),
            starts=np.array([0, tokens], np.int32),
            row_slots=spare,
        )


class RunningStep:
    """A launched step. It keeps what the device still reads."""

    def __init__(self, runner: ModelRunner, inputs: StepInputs, staged: dict[str, Tensor]) -> None:
        self._runner = runner
        self.inputs = inputs
        self.staged = staged
        self.graph = False
        self.logits: Tensor | None = None
        self.prompt_logprobs: Tensor | None = None
        self.fetched: list[Tensor] = []
        self.has_logprobs = False
        self.ticket: Ticket | None = None

    def sample(self, bitmask: NDArray[np.int32] | None) -> None:
        """Draw the tokens; ``bitmask`` int32 [rows, ceil(vocab / 32)]: a set bit allows its token; None: all."""
        self._runner.sample(self, bitmask)
        self.logits = None

    def wait(self) -> StepOutputs:
        """Block until the step is done."""
        assert self.ticket is not None, "the step's tokens were not sampled"
        with device_errors():
            begin_ns, end_ns = self.ticket.wait()
        arrays = [tensor.numpy() for tensor in self.fetched]
        outputs = StepOutputs(self.inputs.index, arrays[0], begin_ns, end_ns, self.graph)
        if self.has_logprobs:
            outputs.logprobs, outputs.top_ids, outputs.top_logprobs = arrays[1:4]
        if self.prompt_logprobs is not None:
            outputs.prompt_logprobs = arrays[-1]
        return outputs


def _wanted(sampled: Sampled) -> list[Tensor]:
    """Nothing, or three: log-probabilities of the tokens [rows], the most likely tokens and theirs [rows, k], k from 0
    on."""
    if sampled.logprobs is None:
        return []
    if sampled.top_ids is None or sampled.top_logprobs is None:
        nobody = sampled.logprobs.new_empty((len(sampled.logprobs), 0))
        return [sampled.logprobs, nobody.to(torch.int32), nobody]
    return [sampled.logprobs, sampled.top_ids, sampled.top_logprobs]


def _present(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]
