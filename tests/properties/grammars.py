"""A grammar that any mistake breaks, on the modelled device: output token i is ``start + i`` by its remainder, then
comes an end of sequence. What a step draws under the mask of another step, or without one, does not follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch
from testbed.costs.model import ConstantCostModel
from testbed.messages import GrammarReady, GrammarSpec, RequestOutput
from testbed.runtime.oracle import Oracle
from testbed.runtime.paced import PacedDevice
from testbed.runtime.wall import WallClock, WallRuntime
from testbed.scenario.schema import ConstantDevice, EngineConfig
from testbed.scheduler.scheduler import Scheduler
from tests.properties.world import (
    VOCABULARY,
    Job,
    Outcome,
    drained,
    ended_once,
    run,
    times_add_up,
    work_adds_up,
)

EOS = 50_020
"""The last of the vocabulary, in a mask's last word, which is not full."""
REMAINDERS = 61
QUICK = ConstantDevice(prefill_ns=20_000, decode_ns=10_000)


class Rule(NamedTuple):
    """What the text of a grammar says here."""

    start: int
    length: int
    """Tokens before the end of sequence."""
    fails_at: int = 1 << 30
    """Outputs behind which its matcher is broken."""

    def spec(self) -> GrammarSpec:
        return GrammarSpec("regex", " ".join(map(str, self)))


BROKEN = GrammarSpec("regex", "broken")


def rule_of(spec: GrammarSpec) -> Rule:
    return Rule(*map(int, spec.text.split()))


def allows(rule: Rule, index: int, token: int) -> bool:
    """Whether ``token`` may be output ``index``."""
    if index >= rule.length:
        return index == rule.length and token == EOS
    return token != EOS and token % REMAINDERS == (rule.start + index) % REMAINDERS


class CountingGrammars:
    """See ports.Grammars. Asserts that it is used as the port says."""

    def __init__(self, runtime: WallRuntime, delay_ns: int) -> None:
        self._runtime = runtime
        self._delay_ns = delay_ns
        self.outputs: dict[int, tuple[Rule, list[int]]] = {}
        """By rank: of requests that have not ended."""
        self.asked: list[int] = []
        self.accepted = 0

    def compile(self, rank: int, spec: GrammarSpec) -> None:
        assert rank not in self.asked, "compiled twice"
        self.asked.append(rank)
        error = "this grammar is broken" if spec == BROKEN else ""
        if not error:
            self.outputs[rank] = rule_of(spec), []
        # Some are ready at once, some after others that came later.
        when_ns = self._runtime.now_ns() + self._delay_ns * (rank * 7 % 5)
        self._runtime.post_at(when_ns, GrammarReady(rank, error))

    def masks(self, batch: Batch) -> NDArray[np.int32] | None:
        bits = np.ones((batch.rows, -(-VOCABULARY // 32) * 32), np.uint8)
        requests = [*(prefill.request for prefill in batch.prefills), *batch.decodes]
        for row, request in enumerate(requests):
            if request.grammar is not None and request.finish_reason is None:
                rule, outputs = self.outputs[request.rank]
                bits[row] = self._allowed(rule, len(outputs), bits.shape[1])
        return np.packbits(bits, axis=1, bitorder="little").view(np.int32)

    @staticmethod
    def _allowed(rule: Rule, index: int, width: int) -> NDArray[np.uint8]:
        allowed = np.zeros(width, np.uint8)
        if index >= rule.fails_at:
            return allowed
        if index >= rule.length:
            allowed[EOS] = 1
            return allowed
        allowed[(rule.start + index) % REMAINDERS : VOCABULARY - 1 : REMAINDERS] = 1
        return allowed

    def accept(self, rank: int, token_id: int) -> None:
        rule, outputs = self.outputs[rank]
        assert allows(rule, len(outputs), token_id), f"token {token_id} is output {len(outputs)} of {rule}"
        outputs.append(token_id)
        self.accepted += 1

    def forget(self, rank: int) -> None:
        self.outputs.pop(rank, None)


def run_constrained(
    config: EngineConfig, jobs: Sequence[Job], *, delay_ns: int = 30_000, **how: Any
) -> tuple[Outcome, CountingGrammars]:
    """Run jobs, some with a ``Rule`` as grammar, on the modelled device on the wall clock."""
    found: list[CountingGrammars] = []

    def before(scheduler: Scheduler, runtime: Any) -> None:
        found.append(CountingGrammars(runtime, delay_ns))
        runtime.grammars = found[0]

    def paced(clock: WallClock, oracle: Oracle, scheduler: Scheduler) -> PacedDevice:
        return PacedDevice(clock, ConstantCostModel(QUICK), oracle, (EOS,))

    outcome = run(config, jobs, device_of=paced, before=before, prove=False, **how)
    for law in (ended_once, times_add_up, work_adds_up):
        law(outcome)
    drained(outcome.scheduler)
    assert not found[0].outputs, "a grammar is held by nobody"
    for job in jobs:
        follows(job, outcome.outputs[job.rid])
    return outcome, found[0]


def follows(job: Job, output: RequestOutput) -> None:
    """The output is what its grammar allows, and ends where it says."""
    if job.grammar is None:
        return
    tokens = output.output_ids.tolist()
    if job.grammar == BROKEN:
        assert output.status in (400, 499) and not tokens
        return
    rule = rule_of(job.grammar)
    assert all(allows(rule, index, token) for index, token in enumerate(tokens)), f"{job.rid}: {tokens}"
    limit = job.outputs if job.max_new_tokens is None else job.max_new_tokens
    if output.finish_reason == "stop":
        assert len(tokens) == rule.length + 1 <= limit
    elif output.finish_reason == "length":
        assert len(tokens) == limit <= rule.length + 1
    elif output.finish_reason == "error":
        assert output.status == 400 and len(tokens) == rule.fails_at
