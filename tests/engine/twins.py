"""The same workload in virtual time, paced and on torch: one log of decisions.

Arrivals and aborts are tied to iterations of the loop; tokens are the oracle's. The worlds are made so that prompts
are cut, share prefixes, are retracted, evicted and aborted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from testbed.engine.device import Device
from testbed.messages import AbortRequest, Message
from testbed.scenario.schema import ConstantDevice
from tests.engine.machine import runs_on
from tests.properties.world import Job, Outcome, engine, run

DEVICE = ConstantDevice(prefill_ns=20_000, decode_ns=10_000)
WHERE = ("simulated", "paced", "torch")
REQUESTS = 24


class Twin(NamedTuple):
    """One workload under one engine, three times."""

    name: str
    outcomes: dict[str, Outcome]

    @property
    def equal(self) -> bool:
        """Whether every log is the same to the byte."""
        return len({outcome.records.decisions for outcome in self.outcomes.values()}) == 1

    def total(self, column: str) -> int:
        """The sum of a step column of the simulated run."""
        steps: Any = self.outcomes["simulated"].records.steps
        return int(steps[column].sum())

    @property
    def aborted(self) -> int:
        """Requests that ended by an abort."""
        return sum(output.finish_reason == "abort" for output in self.outcomes["simulated"].sent)


def jobs_and_aborts(seed: int, kv_tokens: int) -> tuple[list[Job], dict[int, list[Message]]]:
    """Requests of several families of prompts, some longer than a chunk; some are aborted while they wait or run."""
    draw = np.random.Generator(np.random.Philox(key=seed)).integers
    jobs: list[Job] = []
    aborts: dict[int, list[Message]] = {}
    for i in range(REQUESTS):
        shared, own = int(draw(0, 20)), int(draw(1, 24))
        prompt = ((f"family{draw(0, 3)}", shared), (f"own{i}", own)) if shared else ((f"own{i}", own),)
        outputs = int(draw(1, min(40, kv_tokens - shared - own - 8)))
        limit = outputs if draw(0, 3) else outputs + int(draw(1, 5))
        iteration = int(draw(0, 50))
        jobs.append(Job(f"r{i}", prompt, outputs, limit, iteration=iteration))
        if not draw(0, 6):
            aborts.setdefault(iteration + int(draw(1, 12)), []).append(AbortRequest(f"r{i}"))
    return jobs, aborts


def three_ways(name: str, device: Device, seed: int, **fields: Any) -> Twin:
    """Run it in virtual time, paced and on ``device``. ``fields``: of the engine."""
    kv_tokens = device.info.kv_tokens
    jobs, aborts = jobs_and_aborts(seed, kv_tokens)
    config = engine(chunked_prefill_size=16, clip_max_new_tokens=1, **fields)
    outcomes = {
        where: run(
            config,
            jobs,
            kv_tokens=kv_tokens,
            device=DEVICE,
            script=aborts,
            prove=False,  # an abort's outputs are as many as were known then
            paced=where == "paced",
            device_of=runs_on(device) if where == "torch" else None,
        )
        for where in WHERE
    }
    return Twin(name, outcomes)
