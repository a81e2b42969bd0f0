"""Who gets the next request (specification F.4, F.7). Of equals the lowest index; chance is a function of the seed.

A user's own policy is a class that is made without arguments and has ``choose``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Protocol

from testbed.messages import GenerateRequest
from testbed.routing.prefix_tree import PrefixTree
from testbed.routing.replica import Replica
from testbed.scenario.plugins import is_plugin, load_object
from testbed.scenario.routing import Routing
from testbed.workload.draw import Uniforms, values

_requests = attrgetter("requests")
_tokens = attrgetter("tokens")


class RoutingPolicy(Protocol):
    """Chooses a replica for each request, in order of their arrival."""

    def choose(self, request: GenerateRequest, replicas: Sequence[Replica]) -> int:
        """The ``index`` of one of ``replicas``: those that take requests, by index, one at least. It is the same
        object until a replica comes or goes."""
        ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, request: GenerateRequest, replicas: Sequence[Replica]) -> int:
        """See RoutingPolicy."""
        for replica in replicas:
            if replica.index > self._last:
                break
        else:
            replica = replicas[0]
        self._last = replica.index
        return replica.index


class RandomReplica:
    """Any, with equal probability."""

    def __init__(self, seed: int) -> None:
        self._numbers = _numbers(seed, "random")

    def choose(self, request: GenerateRequest, replicas: Sequence[Replica]) -> int:
        """See RoutingPolicy."""
        return replicas[int(next(self._numbers) * len(replicas))].index


class ShortestQueue:
    """The fewest requests, waiting or running."""

    def choose(self, request: GenerateRequest, replicas: Sequence[Replica]) -> int:
        """See RoutingPolicy."""
        return min(replicas, key=_requests).index


class LeastTokens:
    """The fewest tokens, in use or waiting (SGLang's minimum_tokens)."""

    def choose(self, request: GenerateRequest, replicas: Sequence[Replica]) -> int:
        """See RoutingPolicy."""
        return min(replicas, key=_tokens).index


class PowerOfTwo:
    """The shorter queue of two replicas that chance picks (M. Mitzenmacher, IEEE TPDS 12(10), 2001)."""

    def __init__(self, seed: int) -> None:
        self._numbers = _numbers(seed, "power of two")

    def choose(self, request: GenerateRequest, replicas: Sequence[Replica]) -> int:
        """See RoutingPolicy."""
        count = len(replicas)
        if count == 1:
            return replicas[0].index
        one, other = divmod(int(next(self._numbers) * count * (count - 1)), count - 1)
        other += other >= one
        lower, higher = replicas[min(one, other)], replicas[max(one, other)]
        return (higher if higher.requests < lower.requests else lower).index


class CacheAware:
    """Where the prompt's beginning was sent before, as long as the replicas are in balance (SGLang's router).

    A prompt that is known in a share above ``cache_threshold`` goes to a replica that was sent the longest prefix of
    it, of several the one with the fewest requests (SGLang's takes any of them); another prompt goes to the replica
    whose tree is smallest. Out of balance, the shortest queue is chosen. SGLang's compares characters and forgets by a
    timer, this one tokens, at once.
    """

    def __init__(self, config: Routing, vocab_size: int) -> None:
        self.tree = PrefixTree(config.max_tree_tokens)
        self._config = config
        self._vocab_size = vocab_size
        self._known: Sequence[Replica] = ()

    def choose(self, request: GenerateRequest, replicas: Sequence[Replica]) -> int:
        """See RoutingPolicy."""
        if replicas is not self._known:
            self._forget_absent(replicas)
        tokens = request.prompt.ids(self._vocab_size)
        chosen = min(replicas, key=_requests)
        if not self._out_of_balance(chosen.requests, max(replicas, key=_requests).requests):
            matched, holders = self.tree.match(tokens, request.extra_key)
            if matched > self._config.cache_threshold * len(tokens):
                chosen = min((replica for replica in replicas if replica.index in holders), key=_requests)
            else:
                sizes = self.tree.sizes
                chosen = min(replicas, key=lambda replica: sizes.get(replica.index, 0))
        self.tree.insert(tokens, chosen.index, request.extra_key)
        return chosen.index

    def _out_of_balance(self, fewest: int, most: int) -> bool:
        config = self._config
        return most - fewest > config.balance_abs_threshold and most > fewest * config.balance_rel_threshold

    def _forget_absent(self, replicas: Sequence[Replica]) -> None:
        present = [replica.index for replica in replicas]
        for index in [index for index in self.tree.sizes if index not in present]:
            self.tree.drop(index)
        self._known = replicas


def build_policy(config: Routing, *, seed: int, vocab_size: int, base_dir: Path) -> RoutingPolicy:
    """The policy that ``config`` names. Raises InputError for a user's own that cannot be made or has no ``choose``."""
    if is_plugin(config.policy):
        takes = ("request", "replicas")
        own: RoutingPolicy = load_object(config.policy, base_dir, where="routing.policy", method="choose", takes=takes)
        return own
    policies: dict[str, RoutingPolicy] = {
        "round_robin": RoundRobin(),
        "random": RandomReplica(seed),
        "shortest_queue": ShortestQueue(),
        "least_tokens": LeastTokens(),
        "power_of_two": PowerOfTwo(seed),
        "cache_aware": CacheAware(config, vocab_size),
    }
    return policies[config.policy]


def _numbers(seed: int, name: str) -> Iterator[float]:
    """Endless numbers in (0, 1)."""
    return values(lambda uniforms: uniforms, Uniforms(seed, "routing", name))
