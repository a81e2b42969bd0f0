"""Order of the waiting queue (specification B.5). A policy sorts the list in place; a user's own is a callable of the
same form: ``policy(waiting: list[Request], scheduler: Scheduler) -> None``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from testbed.memory import Node, PageAllocator, RadixCache
from testbed.request import Request
from testbed.tokens import stream_key

if TYPE_CHECKING:
    from testbed.scheduler.scheduler import Scheduler

Policy = Callable[[list[Request], "Scheduler"], None]

LPM_LIMIT = 128
"""Above this many waiting requests ``lpm`` leaves the queue as it is: matching everybody costs too much (SGLang)."""


def fcfs(waiting: list[Request], scheduler: Scheduler) -> None:
    """First come, first served: the queue is in order of arrival already."""


def lof(waiting: list[Request], scheduler: Scheduler) -> None:
    """Longest output first (by ``max_new_tokens``)."""
    waiting.sort(key=lambda request: -request.max_new_tokens)


def shuffled(waiting: list[Request], scheduler: Scheduler) -> None:
    """A random order, a function of the seed and the step alone."""
    key = stream_key("random policy", scheduler.seed, scheduler.steps)
    order = np.random.Philox(key=key).random_raw(len(waiting))
    waiting[:] = [waiting[i] for i in np.argsort(order, kind="stable")]


def lpm(waiting: list[Request], scheduler: Scheduler) -> None:
    """Longest cached prefix first. Of requests that share a prefix that is not cached yet only the first keeps its
    place; the others go last, so that they find it cached (in-batch prefix caching)."""
    if len(waiting) > LPM_LIMIT:
        return
    deprioritised = match_prefixes(waiting, scheduler)[1]
    far = max((len(request.fill_ids) for request in waiting), default=0) + 1
    waiting.sort(key=lambda request: far if request.rank in deprioritised else -request.matched)


def dfs_weight(waiting: list[Request], scheduler: Scheduler) -> None:
    """Depth-first through the prefix tree, heavier subtrees (more waiting requests) first, children before parents."""
    last_nodes = match_prefixes(waiting, scheduler)[0]
    at: dict[Node, list[Request]] = {}
    for request, node in zip(waiting, last_nodes, strict=True):
        at.setdefault(node, []).append(request)
    weight = {node: len(requests) for node, requests in at.items()}
    order: list[Node] = []
    for space in scheduler.cache.spaces():
        stack = [space]
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(node.children.values())
    for node in reversed(order):  # children before parents
        if node.parent is not None:
            weight[node.parent] = weight.get(node.parent, 0) + weight.get(node, 0)
    waiting.clear()
    for space in scheduler.cache.spaces():
        _emit(space, weight, at, waiting)


def _emit(root: Node, weight: dict[Node, int], at: dict[Node, list[Request]], into: list[Request]) -> None:
    """Post-order walk, heavier children first (a loop: prefix chains can be thousands of nodes deep)."""
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            into.extend(at.get(node, ()))
            continue
        stack.append((node, True))
        children = sorted((child for child in node.children.values()), key=lambda child: -weight.get(child, 0))
        stack.extend((child, False) for child in reversed(children) if weight.get(child, 0))


def match_prefixes(waiting: list[Request], scheduler: Scheduler) -> tuple[list[Node], set[int]]:
    """Match everybody (``request.matched``); returns the last nodes and the ranks of deprioritised requests."""
    config = scheduler.config
    last_nodes: list[Node] = []
    deprioritised: set[int] = set()
    scratch = RadixCache(PageAllocator(1, 1))
    for request in waiting:
        tokens = request.matchable_ids
        match = scheduler.cache.match(tokens, request.extra_key)
        request.matched = len(match.pages) * config.page_size
        last_nodes.append(match.node)
        if request.matched > config.in_batch_check_threshold:
            continue
        if len(scratch.match(tokens, request.extra_key).pages) >= config.in_batch_deprioritize_threshold:
            deprioritised.add(request.rank)
        else:
            scratch.insert(tokens, tokens, request.extra_key)
    scheduler.matched_in_policy += sum(request.matched for request in waiting)
    return last_nodes, deprioritised


POLICIES: dict[str, Policy] = {"fcfs": fcfs, "lof": lof, "random": shuffled, "lpm": lpm, "dfs_weight": dfs_weight}
CACHE_AWARE = (lpm, dfs_weight)


def with_priority(policy: Policy, low_values_first: bool, by_arrival: bool = True) -> Policy:
    """Order by request priority, within equal priority by ``policy``. A missing priority is the worst. First come,
    first served means ``by_arrival`` at the engine, or (as SGLang) entry into the queue, which a retraction renews."""
    sign = 1 if low_values_first else -1

    def ordered(waiting: list[Request], scheduler: Scheduler) -> None:
        if policy is not fcfs:
            policy(waiting, scheduler)
        elif by_arrival:
            waiting.sort(key=lambda request: request.rank)
        waiting.sort(key=lambda r: (1, 0) if r.priority is None else (0, sign * r.priority))

    return ordered
