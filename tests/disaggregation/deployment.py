"""Prefill and decode engines, a router and faulty links in one virtual world, with every page's content watched.

Every run proves, at every iteration of every loop, the full invariants of both sides; that each step reads its own KV;
and in the end that each request was answered once, with its own tokens, and that nothing is left anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from testbed.batch import Batch
from testbed.costs import constant_host
from testbed.costs.model import ConstantCostModel
from testbed.loops.base import LoopContext
from testbed.loops.decode import event_loop_normal_decode, event_loop_overlap_decode
from testbed.loops.prefill import (
    event_loop_normal_prefill,
    event_loop_overlap_prefill,
    event_loop_pipeline_prefill,
)
from testbed.messages import (
    AbortRequest,
    ControlOutput,
    GenerateRequest,
    KvChunk,
    Message,
    RequestOutput,
    chunk_checksum,
)
from testbed.metrics import laws
from testbed.metrics.recorder import Recorder
from testbed.request import Request
from testbed.routing.pairs import PairRouter, Step
from testbed.runtime.channels import connect_stages
from testbed.runtime.links import Faults, Links, LinkSpec, Port
from testbed.runtime.oracle import Oracle
from testbed.runtime.virtual import VirtualRuntime
from testbed.runtime.world import World
from testbed.scenario.schema import ConstantDevice, EngineConfig
from testbed.scheduler.disaggregation import Terms
from testbed.scheduler.scheduler import Scheduler
from tests.disaggregation.contents import GARBAGE, KvContents, fingerprints, outputs_of
from tests.properties.world import DEVICE, VOCABULARY, Job, engine

LOOPS = {
    ("prefill", "normal"): event_loop_normal_prefill,
    ("prefill", "overlap"): event_loop_overlap_prefill,
    ("prefill", "pipeline"): event_loop_pipeline_prefill,
    ("decode", "normal"): event_loop_normal_decode,
    ("decode", "overlap"): event_loop_overlap_decode,
}
DESIGNS = ("normal", "overlap")
CHANNEL_NS = 200
LINK = LinkSpec(gb_per_s=1.0, latency_ns=500)
SECOND = 10**9
TIMEOUT = SECOND // 100
"""Of every lease, unless a test says otherwise: far beyond what a fault-free run takes, and soon over."""
ITERATIONS = 5_000
"""More than any of these runs has: a loop that goes on has a defect."""


class NodeRuntime(VirtualRuntime):
    """An engine's ports, with its device's memory."""

    node: Node

    async def recv(self, block: bool) -> tuple[int, list[Message]]:
        self.node.begin_iteration()
        return await super().recv(block)

    def launch(self, batch: Batch, defer_sampling: bool = False, after: object = None) -> Any:
        pending = super().launch(batch, defer_sampling, after)
        self.node.compute(batch, pending.outcome.end_ns)
        return pending


class Node:
    """One engine, from its start to its death; of a pipeline, one stage."""

    def __init__(
        self, deployment: Deployment, role: str, number: int, epoch: int, config: EngineConfig, stage: int = 0
    ) -> None:
        self.deployment = deployment
        self.role, self.name, self.epoch = role, f"{role} {number}", epoch
        self.config, self.stage = config, stage
        self.alive = True
        self.iterations = 0
        setup = deployment.setup
        self.recorder = Recorder()
        kv_tokens = setup.prefill_tokens if role == "prefill" else setup.decode_tokens
        stages = setup.stages if role == "prefill" else 1
        self.scheduler = Scheduler(
            config,
            kv_tokens=kv_tokens,
            context_length=100_000,
            vocab_size=VOCABULARY,
            recorder=self.recorder,
            checks="full",
            terms=Terms(role, self.name, epoch, stage=stage, stages=stages, **setup.terms),  # type: ignore[arg-type]
        )
        slots = self.scheduler.memory.slots.count
        self.layers = [KvContents(config.page_size) for _ in range(1 if role == "prefill" else setup.stages)]
        """What lies in its layers, by the prefill engine's stage whose they are there."""
        self.runtime = NodeRuntime(
            world=deployment.world,
            users=None if stage else self,
            cost_model=ConstantCostModel(setup.device if role == "prefill" else setup.decode_device),
            host=constant_host(setup.host_ns),
            recorder=self.recorder,
            oracle=Oracle(setup.seed, VOCABULARY, slots, stop_at=deployment.stop_at) if stage == stages - 1 else None,
        )
        self.runtime.node = self
        self.adapter = f"{self.name} stage {stage}" if stage else self.name
        self.runtime.peers = Port(deployment.links, self.adapter, lambda: self.runtime.local_ns)
        deployment.links.connect(self.adapter, self.arrive)
        if self.scheduler.decode_side is not None:
            self._watch_host_copies()

    def start(self) -> None:
        loop = LOOPS[self.role, self.config.loop]
        self.deployment.world.start(self.name, loop(LoopContext(self.scheduler, self.runtime)))

    # -- what its loop says and hears ---------------------------------------------------------------------------

    tied_to_iterations = False

    def due(self, iteration: int, now_ns: int) -> list[Message]:
        return []

    def hear(self, output: RequestOutput | ControlOutput, now_ns: int) -> None:
        if self.alive and isinstance(output, RequestOutput):
            self.deployment.heard(self, output)

    def begin_iteration(self) -> None:
        self.scheduler.invariants.full()
        assert self.iterations < ITERATIONS, "a loop goes on for ever"
        for action in self.deployment.script.pop((self.name, self.iterations), ()):
            action(self.deployment)
        self.iterations += 1

    def arrive(self, message: Message) -> None:
        if isinstance(message, KvChunk):
            self._written_by_the_network(message)
        self.runtime.deliver(message)

    # -- what its memory holds ------------------------------------------------------------------------------------

    def compute(self, batch: Batch, end_ns: int) -> None:
        """The device reads what comes before, and writes the new tokens' KV, when it has done the batch."""
        tables = self.scheduler.memory.slots.pages
        rows: list[tuple[Request, int, int, list[int]]] = []
        for request, prefix, new, _ in batch.prefills:
            rows.append((request, prefix, prefix + new, tables[request.slot].tolist()))
        for request, slot, length in zip(batch.decodes, batch.slots.tolist(), batch.seq_lens.tolist(), strict=True):
            rows.append((request, length - 1, length, tables[slot, : length // self.page_size + 1].tolist()))
        slots = [request.slot for request, *_ in rows]
        self.deployment.world.at(end_ns, lambda: self._computed(rows, slots))

    def _computed(self, rows: list[tuple[Request, int, int, list[int]]], slots: list[int]) -> None:
        for (request, start, end, pages), slot in zip(rows, slots, strict=True):
            own = self.deployment.fingerprints_of(request.rid)
            if request.finish_reason is None and request.slot == slot:
                self.expect(f"{self.name}, {request.rid}", pages, own[:start])
            self.write(pages, start, own[start:end])

    def expect(self, who: str, pages: Sequence[int], values: Sequence[int]) -> None:
        for contents in self.layers:
            contents.expect(who, contents.places(pages, 0, len(values)), values)

    def write(self, pages: Sequence[int], start: int, values: Sequence[int]) -> None:
        for contents in self.layers:
            contents.write(contents.places(pages, start, start + len(values)), values)

    @property
    def page_size(self) -> int:
        return self.scheduler.config.page_size

    def _written_by_the_network(self, chunk: KvChunk) -> None:
        """One-sided, as RDMA: nobody asks the scheduler, but pages of rooms that it has closed are out of reach. The
        source is read at the last moment."""
        side = self.scheduler.decode_side
        if side is None or chunk.to_epoch != self.epoch:
            return
        if chunk.room not in side.transfer and chunk.room not in side.aside:
            return
        count = len(chunk.pages) * self.page_size
        if chunk.checksum != chunk_checksum(chunk):
            self.write(chunk.pages.tolist(), 0, [GARBAGE] * count)
            return
        source = self.deployment.engines[chunk.sender, chunk.epoch, chunk.stage].layers[0]
        values = source.read(source.places(chunk.source_pages.tolist(), 0, count))
        contents = self.layers[chunk.stage]
        contents.write(contents.places(chunk.pages.tolist(), 0, count), values)

    def _watch_host_copies(self) -> None:
        side, memory = self.scheduler.decode_side, self.scheduler.memory
        assert side is not None
        dropped: dict[int, list[int]] = {}
        drop, save, take = memory.drop, side.save, side._take_memory

        def dropping(request: Request, tokens: int) -> None:
            dropped[request.rank] = memory.slots.pages[request.slot].tolist()[: -(-tokens // self.page_size)]
            drop(request, tokens)

        def saving(request: Request, outputs: Any) -> None:
            save(request, outputs)
            count = len(request.fill_ids)
            own = self.deployment.fingerprints_of(request.rid)
            self.expect(f"{self.name}, {request.rid} to the host", dropped[request.rank], own[:count])

        def taking(request: Request, tokens: int) -> Any:
            pages = take(request, tokens)
            if request.sampled:  # back from the host, in the order of the device's stream
                own = self.deployment.fingerprints_of(request.rid)[:tokens]
                when = max(self.runtime.device_free_ns, self.runtime.local_ns)
                self.deployment.world.at(when, lambda: self.write(pages.tolist(), 0, own))
            return pages

        memory.drop, side.save, side._take_memory = dropping, saving, taking  # type: ignore[method-assign]


@dataclass(frozen=True)
class Setup:
    """What a deployment is made of."""

    prefills: int = 1
    decodes: int = 1
    stages: int = 1
    """Of each prefill engine."""
    prefill_loop: str = "normal"
    decode_loop: str = "normal"
    prefill_tokens: int = 4096
    decode_tokens: int = 4096
    engine: Mapping[str, Any] = field(default_factory=dict)
    decode_engine: Mapping[str, Any] = field(default_factory=dict)
    """Where decode engines differ."""
    terms: Mapping[str, Any] = field(default_factory=dict)
    link: LinkSpec = LINK
    device: ConstantDevice = DEVICE
    decode_device: ConstantDevice = DEVICE
    host_ns: int = 0
    seed: int = 0

    def config(self, role: str) -> EngineConfig:
        if role == "decode":
            return engine(**{"loop": self.decode_loop, **self.engine, **self.decode_engine})
        loop = "pipeline" if self.stages > 1 else self.prefill_loop
        return engine(**{"loop": loop, "parallel": {"pp": self.stages}, **self.engine})


Action = Callable[["Deployment"], None]


class Deployment:
    """The world, its engines, its clients."""

    def __init__(
        self,
        setup: Setup,
        jobs: Sequence[Job],
        *,
        faults: Faults | None = None,
        script: Mapping[tuple[str, int], Sequence[Action]] | None = None,
        at: Sequence[tuple[int, Action]] = (),
        loses: Callable[[str, str], bool] = lambda rid, engine: False,
    ) -> None:
        """``script``: actions before an engine's iteration; ``at``: at times; ``loses``: whether the router loses the
        half of a request on its way to an engine."""
        terms = {"bootstrap_timeout_ns": TIMEOUT, "transfer_timeout_ns": TIMEOUT, "reserved_decode_tokens": 4}
        self.setup = replace(setup, terms={**terms, **setup.terms})
        self.world = World()
        self.links = Links(self.world, setup.link, faults)
        self.stop_at: dict[str, int] = {}
        self.jobs = {job.rid: job for job in jobs}
        self.script = dict(script or {})
        self.loses = loses
        self.answers: list[RequestOutput] = []
        self.sent = 0
        self.world.open_requests = lambda: self.sent - len(self.answers)
        self.nodes: dict[str, Node] = {}
        """The engines that there are, by name."""
        self.engines: dict[tuple[str, int, int], Node] = {}
        """And those that there were, by name, epoch and stage."""
        self._fingerprints: dict[str, list[int]] = {}
        names = {}
        for role, count in (("prefill", setup.prefills), ("decode", setup.decodes)):
            for number in range(count):
                self._start(role, number, 1)
            names[role] = [f"{role} {number}" for number in range(count)]
        self.router = PairRouter(names["prefill"], names["decode"], setup.seed)
        for job in jobs:
            self.world.at(job.arrival_ns, partial(self._send, job))
        for when, action in at:
            self.world.at(when, partial(action, self))

    def run(self) -> Deployment:
        self.world.run()
        return self

    # -- clients ------------------------------------------------------------------------------------------------

    def _send(self, job: Job) -> None:
        timed = job.timed()._replace(arrival_ns=int(self.world.env.now))
        Oracle(0, VOCABULARY, 0, stop_at=self.stop_at).expect(timed)
        self.sent += 1
        self._carry(self.router.submit(timed.request))

    def _carry(self, step: Step) -> None:
        self.answers.extend(step.answers)
        for name, message in step.sent:
            assert isinstance(message, (GenerateRequest, AbortRequest))
            if self.nodes[name].alive and not self.loses(message.rid, name):
                self.nodes[name].runtime.deliver(message)

    def abort(self, rid: str) -> None:
        self._carry(self.router.abort(AbortRequest(rid)))

    def heard(self, node: Node, output: RequestOutput) -> None:
        self._carry(self.router.ended(node.name, output))

    # -- engines that die and return ----------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """Its loop goes on where nobody hears it: for all others it is gone."""
        node = self.nodes[name]
        if not node.alive:
            return
        for other in self.engines.values():
            if (other.name, other.epoch) == (name, node.epoch):
                other.alive = False
                self.links.kill(other.adapter)
        self._carry(self.router.lost(name))

    def restart(self, name: str) -> None:
        old = self.nodes[name]
        number = int(name.split()[1])
        self._start(old.role, number, old.epoch + 1)

    def _start(self, role: str, number: int, epoch: int) -> None:
        stages = self.setup.stages if role == "prefill" else 1
        built = [Node(self, role, number, epoch, self.setup.config(role), stage) for stage in range(stages)]
        if stages > 1:
            connect_stages([node.runtime for node in built], CHANNEL_NS)
        self.nodes[built[0].name] = built[0]
        for node in built:
            self.engines[node.name, epoch, node.stage] = node
            node.start()

    # -- what should be ---------------------------------------------------------------------------------------------

    def fingerprints_of(self, rid: str) -> list[int]:
        if rid not in self._fingerprints:
            job = self.jobs[rid]
            prompt = job.timed().request.prompt.ids(VOCABULARY)
            outputs = outputs_of(self.setup.seed, rid, job.outputs + 8)
            self._fingerprints[rid] = fingerprints(np.concatenate((prompt, outputs)))
        return self._fingerprints[rid]

    def streams(self) -> dict[str, list[int]]:
        return {answer.rid: answer.output_ids.tolist() for answer in self.answers if answer.status == 200}

    def counter(self, name: str) -> int:
        return sum(node.recorder.counters.get(name, 0) for node in self.engines.values())

    def prove(self) -> Deployment:
        """One answer a request, with its own tokens; nothing left; times that add up."""
        assert Counter(answer.rid for answer in self.answers) == Counter(list(self.jobs)), "not one answer a request"
        for answer in self.answers:
            job = self.jobs[answer.rid]
            expected = outputs_of(self.setup.seed, answer.rid, len(answer.output_ids))
            assert np.array_equal(answer.output_ids, expected), f"{answer.rid}: foreign tokens"
            limit = job.outputs if job.max_new_tokens is None else job.max_new_tokens
            if answer.status == 200:
                assert len(answer.output_ids) == min(job.outputs, limit), f"{answer.rid}: wrong length"
                assert answer.finish_reason == ("length" if len(answer.output_ids) == limit else "stop"), answer.rid
            else:
                assert answer.message and len(answer.output_ids) <= job.outputs
        for node in self.engines.values():
            if node.alive and node.epoch == self.nodes[node.name].epoch:
                _drained(node)
                _times_add_up(node)
        for (name, epoch, stage), node in self.engines.items():
            if stage and node.alive:
                first = self.engines[name, epoch, 0].scheduler.decision_log.bytes()
                assert node.scheduler.decision_log.bytes() == first, f"{name}: stage {stage} decides otherwise"
        return self


def _drained(node: Node) -> None:
    scheduler = node.scheduler
    memory, side = scheduler.memory, scheduler.side
    assert side is not None
    assert scheduler.idle and not scheduler.requests, f"{node.name}: not drained: {list(scheduler.requests)}"
    cached = memory.cache.evictable_tokens // memory.page_size
    assert memory.allocator.free_pages + cached == memory.allocator.num_pages, f"{node.name}: not drained: pages"
    assert memory.slots.available == memory.slots.count, f"{node.name}: not drained: slots"
    assert not side.rooms.leased and not side.rooms.outgoing, f"{node.name}: not drained: leases"
    scheduler.invariants.when_idle()


def _times_add_up(node: Node) -> None:
    ended = node.recorder._ended
    sent = {rid: (entry.figures[1], "", "") for rid, entry in ended.items()}
    records = node.recorder.records(sent, node.scheduler.decision_log.bytes())
    assert not laws.closure(records).any(), f"{node.name}: times do not add up"
    for part in laws.TIME_PARTS:
        column = np.asarray(records.requests[part])
        assert (column >= 0).all(), f"{node.name}: {part} is negative"


def abort(rid: str) -> Action:
    return lambda deployment: deployment.abort(rid)


def kill(name: str) -> Action:
    return lambda deployment: deployment.kill(name)


def restart(name: str) -> Action:
    return lambda deployment: deployment.restart(name)


def run(setup: Setup, jobs: Sequence[Job], **how: Any) -> Deployment:
    return Deployment(setup, jobs, **how).run().prove()
