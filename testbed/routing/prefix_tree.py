"""What was sent where: one prefix tree for all replicas, an approximation of what their caches hold (SGLang's router).

Every node says which replicas were sent the tokens up to its end, and when last. Whoever holds a node holds its
parents. A replica that holds more than ``max_tokens`` forgets its least recently sent leaves. Time is a counter of
insertions.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Key = tuple[str, int]
"""Name space and first token: requests with different ``extra_key`` share nothing."""


class Node:
    """An edge of the tree with what follows it: ``tokens`` int32 [n]."""

    __slots__ = ("children", "holders", "key", "parent", "tokens")

    def __init__(self, parent: Node | None, key: Key, tokens: Ints) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.children: dict[Key, Node] = {}
        self.holders: dict[int, int] = {}
        """By replica: when it was last sent these tokens."""


class PrefixTree:
    """``match``, ``insert``, ``drop``; sizes in tokens."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.sizes: dict[int, int] = {}
        """Tokens by replica."""
        self._root = Node(None, ("", 0), np.empty(0, np.int32))
        self._clock = 0
        self._leaves: dict[int, list[tuple[int, int, Node]]] = {}
        """By replica, a heap of (when sent, serial, node). A node is offered when it becomes a leaf of the replica's;
        what has changed since is found when the entry comes up."""
        self._offered: dict[int, set[Node]] = {}
        """By replica, the nodes in its heap: each is there once."""
        self._serial = 0

    def match(self, tokens: Ints, extra_key: str = "") -> tuple[int, list[int]]:
        """The longest prefix of ``tokens``, int32 [n], that some replica was sent: its length, and who was."""
        node, start, end = self._root, 0, len(tokens)
        while start < end:
            child = node.children.get((extra_key, int(tokens[start])))
            if child is None:
                break
            same = _common(child.tokens, tokens[start:])
            start += same
            node = child
            if same < len(child.tokens):
                break
        return start, list(node.holders)

    def insert(self, tokens: Ints, replica: int, extra_key: str = "") -> None:
        """``replica`` is sent ``tokens``, int32 [n]."""
        self._clock += 1
        node, start, end = self._root, 0, len(tokens)
        while start < end:
            key = (extra_key, int(tokens[start]))
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(node, key, tokens[start:].copy())
            else:
                same = _common(child.tokens, tokens[start:])
                if same < len(child.tokens):
                    child = _split(child, same)
            if replica not in child.holders:
                self.sizes[replica] = self.sizes.get(replica, 0) + len(child.tokens)
                child.holders[replica] = self._clock
                self._offer(child, replica)
            child.holders[replica] = self._clock
            start += len(child.tokens)
            node = child
        if self.sizes.get(replica, 0) > self.max_tokens:
            self._evict(replica)

    def drop(self, replica: int) -> None:
        """Forget all that ``replica`` was sent: it is gone."""
        stack = [self._root]
        while stack:
            node = stack.pop()
            for child in list(node.children.values()):
                if child.holders.pop(replica, None) is None:
                    continue
                if child.holders:
                    stack.append(child)
                else:
                    del node.children[child.key]
        self.sizes.pop(replica, None)
        self._leaves.pop(replica, None)
        self._offered.pop(replica, None)

    def _evict(self, replica: int) -> None:
        leaves, in_heap = self._leaves[replica], self._offered[replica]
        while self.sizes[replica] > self.max_tokens:
            offered, _, node = heappop(leaves)
            in_heap.remove(node)
            sent = node.holders.get(replica)
            if sent is None:
                continue
            if sent != offered:
                self._offer(node, replica)
            elif not _has_child(node, replica):
                self._forget(node, replica)

    def _forget(self, leaf: Node, replica: int) -> None:
        parent = leaf.parent
        assert parent is not None
        del leaf.holders[replica]
        self.sizes[replica] -= len(leaf.tokens)
        if not leaf.holders:
            del parent.children[leaf.key]
        if parent.parent is not None and not _has_child(parent, replica):
            self._offer(parent, replica)

    def _offer(self, leaf: Node, replica: int) -> None:
        in_heap = self._offered.setdefault(replica, set())
        if leaf in in_heap:
            return
        in_heap.add(leaf)
        self._serial += 1
        heappush(self._leaves.setdefault(replica, []), (leaf.holders[replica], self._serial, leaf))


def _has_child(node: Node, replica: int) -> bool:
    return any(replica in child.holders for child in node.children.values())


def _common(edge: Ints, tokens: Ints) -> int:
    """How many leading tokens both share."""
    length = min(len(edge), len(tokens))
    different = edge[:length] != tokens[:length]
    first = int(different.argmax())
    return first if different[first] else length


def _split(child: Node, length: int) -> Node:
    """Cut ``child`` after ``length`` tokens; returns the new upper node, with the same holders."""
    parent = child.parent
    assert parent is not None and 0 < length < len(child.tokens)
    upper = Node(parent, child.key, child.tokens[:length])
    upper.holders = dict(child.holders)
    parent.children[child.key] = upper
    child.parent, child.tokens = upper, child.tokens[length:]
    child.key = (child.key[0], int(child.tokens[0]))
    upper.children[child.key] = child
    return upper
