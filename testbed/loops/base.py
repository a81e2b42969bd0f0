"""What every event loop is made of: SGLang's steps, with the cost of each charged to the host thread."""

from __future__ import annotations

from testbed.batch import Batch, StepResult
from testbed.messages import BatchGenerateRequest, GenerateRequest, Message, Timer
from testbed.ports import (
    Cpu,
    Executor,
    Grammars,
    Inbox,
    Neighbours,
    Outbox,
    Peers,
    Pending,
    Ports,
    Reports,
    Stage,
    Threads,
)
from testbed.request import Request
from testbed.scenario.errors import InputError
from testbed.scheduler.load import load_report
from testbed.scheduler.open_rows import open_rows
from testbed.scheduler.scheduler import Scheduler


class LoopContext:
    """A scheduler and the ports it is driven through. A loop is a coroutine function that takes one of these."""

    def __init__(self, scheduler: Scheduler, ports: Ports) -> None:
        self.scheduler = scheduler
        self.inbox: Inbox = ports.inbox
        self.cpu: Cpu = ports.cpu
        self.executor: Executor = ports.executor
        self.outbox: Outbox = ports.outbox
        self.grammars: Grammars = ports.grammars
        self.neighbours: Neighbours = ports.neighbours
        self.peers: Peers = ports.peers
        self.threads: Threads = ports.threads
        self.reports: Reports | None = ports.reports
        self.now_ns = 0
        """The stamp of this iteration: the only time that decisions may use."""
        self.messages: list[Message] = []
        """What came with it."""
        self.unsampled: tuple[Batch, Pending] | None = None
        """The last launch, while its masks wait for the result of the one before."""

    async def recv_requests(self, block: bool) -> None:
        """Take in every message that has arrived; with ``block``, wait for one."""
        self.now_ns, messages = await self.inbox.recv(block)
        self.messages = messages
        prompt_tokens = sum(map(received_tokens, messages)) if messages else 0
        self.cpu.charge(Stage.RECEIVE, 0, prompt_tokens, len(messages))
        for message in messages:
            for output in self.scheduler.handle_message(self.now_ns, message):
                self.outbox.send(output)
        if messages:
            self._order_grammars()

    def get_next_batch_to_run(self) -> Batch | None:
        """The scheduler's decision."""
        scheduler = self.scheduler
        batch = scheduler.get_next_batch_to_run(self.now_ns)
        rows = len(scheduler.running.requests)
        if batch is None:
            self.cpu.charge(Stage.SCHEDULE, rows, waiting=scheduler.scanned)
        elif not batch.prefills:
            # Policies may have matched the whole queue for nothing.
            self.cpu.charge(Stage.SCHEDULE, rows, 0, 0, scheduler.scanned, scheduler.matched_in_policy)
            self.cpu.charge(Stage.PREPARE, rows)
        else:
            new_tokens = sum(batch.shape.new_tokens)
            matched = scheduler.matched_tokens + scheduler.matched_in_policy
            self.cpu.charge(Stage.SCHEDULE, rows, new_tokens, scheduler.admitted, scheduler.scanned, matched)
            self.cpu.charge(Stage.PREPARE, batch.rows, new_tokens)
        for when_ns in scheduler.wakes:
            self.inbox.post_at(when_ns, Timer("wake"))
        scheduler.wakes.clear()
        if scheduler.failed:
            self._send_ends(scheduler.failed)
            scheduler.failed = []
        return batch

    async def run_batch(self, batch: Batch) -> Pending:
        """Launch; returns without waiting for the device.

        What a grammar allows next follows from the token before. So a batch with a grammar is launched without
        sampling, which comes as a second phase: here, or where a launched batch before it has a grammar too, as soon
        as that one's tokens are known (SGLang's delayed sampling). The loop's own thread does both, and never waits
        for masks: there is always a result to process where masks are late, and no dummy batch needs to bring one.
        """
        if self.scheduler.forward_sleep_ns:
            await self.cpu.sleep(self.scheduler.forward_sleep_ns)
        assert self.unsampled is None, "the masks of a launch are known before the next one"
        pending = self.executor.launch(batch, batch.has_grammar)
        if batch.has_grammar:
            self.unsampled = batch, pending
            self.sample()
        return pending

    def sample(self) -> None:
        """The second phase of the last launch, once its masks are known: no batch in flight before it has a grammar."""
        if not any(before.has_grammar for before in self.scheduler.in_flight[:-1]):
            self._sample()

    def _sample(self) -> None:
        """The second phase of the last launch, if it waits for that."""
        if self.unsampled is not None:
            batch, pending = self.unsampled
            self.unsampled = None
            pending.sample(self.grammars.masks(batch))

    async def process_batch_result(self, batch: Batch, pending: Pending) -> None:
        """Wait for the result, apply it, sample the batch that waits for it, send the tokens and the ends. Raises
        InputError for a result without tokens: a loop that knows of no stages, in a pipeline."""
        result = await pending.result()
        rows = len(result.token_ids)
        if not rows:
            raise InputError(
                "the event loop processes a result without tokens: a pipeline's last stage alone draws them",
                where="engine.loop",
                remedy="let the loop hand on what a stage makes, as testbed/loops/pipeline.py, or use loop: auto",
            )
        ended = self.scheduler.process_batch_result(batch, result)
        self.cpu.charge(Stage.PROCESS, rows, 0, len(ended))
        if batch.has_grammar:
            self._accept(batch, result)
        if self.unsampled is not None:
            self.sample()
        sent_ns = self.outbox.send_tokens(batch, result)
        self.scheduler.outputs_sent(batch, result, ended, sent_ns)
        if ended:
            for request in ended:
                self.outbox.send(self.scheduler.output_of(request))
            self.cpu.charge(Stage.FINISH, len(ended))
            self._order_grammars()
        if self.reports is not None:
            processed = self.scheduler.steps - len(self.scheduler.in_flight)
            if processed % self.reports.every_steps == 0:
                self.reports.send(load_report(self.scheduler))

    def _accept(self, batch: Batch, result: StepResult) -> None:
        """Grammars move on by what was drawn."""
        for row, request in open_rows(batch):
            if request.grammar is not None:
                self.grammars.accept(request.rank, int(result.token_ids[row]))

    def _order_grammars(self) -> None:
        """Let the grammars of new requests be compiled, and those of ended ones go."""
        orders = self.scheduler.grammar_queue.orders
        for rank, spec in orders:
            if spec is None:
                self.grammars.forget(rank)
            else:
                self.grammars.compile(rank, spec)
        orders.clear()

    def self_check_during_idle(self) -> None:
        """An iteration that found nothing to do."""
        self.scheduler.recorder.count("idle_iterations")
        self.scheduler.on_idle()
        if self.reports is not None:
            self.reports.send(load_report(self.scheduler))

    def _send_ends(self, requests: list[Request]) -> None:
        for request in requests:
            self.scheduler.recorder.ended(request, len(request.output_ids), self.now_ns)
            self.outbox.send(self.scheduler.output_of(request))
        self._order_grammars()


def received_tokens(message: Message) -> int:
    """Prompt tokens of a message."""
    if isinstance(message, GenerateRequest):
        return len(message.prompt)
    if isinstance(message, BatchGenerateRequest):
        return sum(len(request.prompt) for request in message.requests)
    return 0
