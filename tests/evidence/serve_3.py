"""Hostile requests and Schemathesis: no 5xx but 503 with Retry-After, nothing leaks, and others are served as before.

Half of the requests are those of the menu (connections that speak broken HTTP, are slow, deaf or gone; bodies that
killed other servers), half are changed at random; one in ten goes to the tiny model on this machine's device, the
others to a modelled one. A well-behaved client asks meanwhile, in a process of its own, and must get exactly its
tokens. Every reply is judged: its status, its form, and whether it tells of paths, addresses or exceptions. Then pages,
requests, tasks and descriptors are counted, and what memory each process has grown by since the first tenth. At last
Schemathesis sends positive and negative data to every operation of the OpenAPI page, with all of its checks.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.evidence.evidence import Evidence
from tests.server import page
from tests.server.hostile.campaign import Tally, assortment, attack_all
from tests.server.hostile.footprint import held, left_behind, resident_bytes
from tests.server.hostile.schemathesis import examine
from tests.server.hostile.steady import steady
from tests.server.hostile.target import WORKERS, known_attacks, target
from tests.server.serving import ADMIN_KEY, Serving

GROWTH_BYTES = 16 << 20
"""What a process may grow by: arenas of its allocator, caches that are bounded."""
AT_ONCE = {True: 64, False: 16}
"""Hostile clients of a modelled and of a real server, which is not to be so slow that a client seems forgotten."""
CALM_S = 4


@dataclass
class Attacked:
    """One server."""

    sent: int = 0
    served: int = 0
    objections: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


def attacked(server: Serving, name: str, count: int, modelled: bool) -> Attacked:
    """``count`` hostile requests, the first tenth to warm it up."""
    known, at_once, begin_s = known_attacks(server), AT_ONCE[modelled], time.monotonic()
    first = asyncio.run(attack_all(server.port, assortment(known, count // 10, seed=1), at_once))
    before, memory = held(server, WORKERS), resident_bytes(server)
    with steady(server, WORKERS, modelled=modelled) as calm:
        time.sleep(CALM_S)
    with steady(server, WORKERS, modelled=modelled) as others:
        rest = asyncio.run(attack_all(server.port, assortment(known, count - count // 10, seed=2), at_once))
    taken_s = time.monotonic() - begin_s
    wrong = [*left_behind(server, WORKERS, before), *calm.wrong, *others.wrong, *first.objections, *rest.objections]
    now = resident_bytes(server)
    grown = {part: now[part] - memory[part] for part in now if part in memory}
    wrong = [f"{part} has grown by {size:,} bytes" for part, size in grown.items() if size > GROWTH_BYTES] + wrong
    if server.errors:
        wrong.insert(0, f"the server's log: {server.errors[-2000:]}")
    details = [
        f"{name}: {first.sent + rest.sent:,} requests of {len(first.kinds | rest.kinds)} kinds in {taken_s:.0f} s; "
        f"replies by status: {_statuses(first, rest)}",
        f"{name}: beside them {others.served:,} good requests, p50 {others.p50_ms:.1f} ms, p99 {others.p99_ms:.1f} ms "
        f"(alone {calm.p50_ms:.1f} and {calm.p99_ms:.1f} ms)",
        f"{name}: memory, MiB: "
        + ", ".join(f"{part.split()[0]} {now[part] / 2**20:.0f} ({grown[part] / 2**20:+.1f})" for part in grown),
    ]
    return Attacked(first.sent + rest.sent, others.served, [f"{name}: {one}" for one in wrong], details)


def _statuses(first: Tally, rest: Tally) -> str:
    counts = first.statuses + rest.statuses
    return ", ".join(f"{status or 'closed'} {counts[status]:,}" for status in sorted(counts))


def check(smoke: bool) -> Evidence:
    """Attack both servers; Schemathesis examines the modelled one behind that."""
    load = page.busy()
    wanted = 1_000 if smoke else 100_000
    with tempfile.TemporaryDirectory() as folder, target(Path(folder), modelled=False) as server:
        found = [attacked(server, "tiny model", wanted // 10, modelled=False)]
    with tempfile.TemporaryDirectory() as folder, target(Path(folder)) as server:
        found.append(attacked(server, "modelled", wanted * 9 // 10, modelled=True))
        examined = examine(server, Path(folder), examples=5 if smoke else 200, key=ADMIN_KEY)
        server.comes_to_rest()
        logged = server.errors
    sent, served = sum(one.sent for one in found), sum(one.served for one in found)
    wrong = [text for one in found for text in one.objections]
    wrong += [] if examined.passed else [examined.output[-6000:]]
    wrong += [f"the modelled server's log: {logged[-2000:]}"] if logged and not found[1].objections else []
    evidence = Evidence(
        figure=f"{sent:,} hostile requests, {served:,} good ones beside them; Schemathesis: {examined.cases:,} cases, "
        f"{examined.operations} of {examined.selected} operations; {len(wrong)} objections",
        bar=f"at least {wanted:,}, all operations, no 5xx but 503 with Retry-After, no crash, nothing leaked, memory "
        f"within {GROWTH_BYTES >> 20} MiB, good clients unaffected, nothing of the inside in any error",
        passed=not wrong and sent >= wanted and served > 0 and examined.operations == examined.selected > 0,
        details=(*(line for one in found for line in one.details), *wrong[:20]),
    )
    seed = "1 and 2 of the attacks, 1 of Schemathesis, 0 of the servers"
    return evidence if smoke else page.keep("serve.3", evidence, seed=seed, load=load)
