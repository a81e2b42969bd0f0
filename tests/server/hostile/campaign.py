"""Many hostile clients at once, and what came of them."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from tests.server.hostile.connections import CLOSED, RANDOM, Attack, body_attack, perform
from tests.server.hostile.verdict import objection, replies


@dataclass
class Tally:
    """What was sent and answered."""

    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    """Of replies; 0: none, though somebody listened."""
    kinds: Counter[str] = field(default_factory=Counter)
    objections: list[str] = field(default_factory=list)

    def add(self, attack: Attack, heard: bytes | None) -> None:
        """One client is done."""
        self.sent += 1
        self.kinds[attack.name] += 1
        if heard is None:
            return
        sent = b"".join(step for step in attack.steps if isinstance(step, bytes))
        found = replies(heard)
        self.statuses.update([reply.status for reply in found] or [CLOSED])
        first = found[0].status if found else CLOSED
        wrong = [objected for reply in found if (objected := objection(reply, sent))]
        if attack.answers and first not in (*attack.answers, 503):
            wrong.append(f"answered with {first or 'nothing'}, not one of {attack.answers}")
        if len(found) > attack.replies:
            wrong.append(f"{len(found)} replies")
        if heard and not found:
            wrong.append(f"an answer that is no HTTP: {heard[:100]!r}")
        self.objections += [f"{attack.name}: {text} (sent {sent[-300:]!r})" for text in wrong]


def assortment(known: Sequence[Attack], count: int, seed: int) -> Iterator[Attack]:
    """``count`` attacks in random order: half are those ``known`` in turn, a tenth connections that are changed at
    random, the rest bodies that are."""
    random = Random(seed)
    made = list(itertools.islice(itertools.cycle(known), count // 2))
    made += [
        random.choice(RANDOM)(random) if random.random() < 0.2 else body_attack(random)
        for _ in range(count - len(made))
    ]
    random.shuffle(made)
    return iter(made)


async def attack_all(
    port: int, attacks: Iterator[Attack], at_once: int, often: Callable[[int], None] = lambda sent: None
) -> Tally:
    """Perform all, ``at_once`` at a time. ``often``: told how many are done, now and then."""
    tally = Tally()

    async def client() -> None:
        for attack in attacks:
            try:
                tally.add(attack, await perform(port, attack))
            except TimeoutError:
                tally.add(attack, None)
                tally.objections.append(f"{attack.name}: neither answered nor closed")
            if tally.sent % 500 == 0:
                often(tally.sent)

    await asyncio.gather(*(client() for _ in range(at_once)))
    return tally
