"""One log of decisions: the same workload simulated, paced and on torch, for both loops and every batching strategy.

Arrivals and aborts are tied to iterations, the pool is given, tokens are the oracle's. Every run cuts prompts, evicts
and aborts; retractions happen where the strategy can run out of memory (``static`` admits nobody beside a batch).
"""

from __future__ import annotations

from itertools import product

from tests.engine.machine import tiny_device
from tests.engine.twins import three_ways
from tests.evidence.evidence import Evidence
from tests.properties.draws import LOOPS, STRATEGIES

KV_TOKENS = 96


def check(smoke: bool) -> Evidence:
    """Run every combination; compare logs to the byte and tokens to the id."""
    seeds = range(1 if smoke else 20)
    different: list[str] = []
    runs = retracted = evicted = aborted = 0
    for page_size, in_process in ((1, False), (16, True)):
        with tiny_device(KV_TOKENS, page_size=page_size, in_process=in_process) as device:
            for seed, loop, batching in product(seeds, LOOPS, STRATEGIES):
                name = f"{loop}, {batching}, pages of {page_size}, seed {seed}"
                twin = three_ways(name, device, seed, loop=loop, batching=batching, page_size=page_size)
                runs += 1
                retracted += twin.total("retracted")
                evicted += twin.total("evicted_tokens")
                aborted += twin.aborted
                streams = [outcome.streams() for outcome in twin.outcomes.values()]
                if not twin.equal or any(stream != streams[0] for stream in streams):
                    different.append(name)
    happened = min(retracted, evicted, aborted) > 0
    return Evidence(
        figure=f"{runs - len(different)} of {runs} workloads with one log in all three; {retracted} retractions, "
        f"{evicted} tokens evicted, {aborted} aborts in them",
        bar="all, with retractions, evictions and aborts",
        passed=not different and happened,
        details=tuple(f"logs differ: {name}" for name in different),
    )
