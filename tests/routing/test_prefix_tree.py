"""The router's tree against lists of what was sent, and its order of forgetting against a search through all leaves."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.routing.prefix_tree import Node, PrefixTree
from tests.routing.naive import Sent, Tokens, common, prefixes

FEW = settings(max_examples=300, deadline=None, derandomize=True)
PROMPTS = st.lists(st.integers(0, 2), max_size=8).map(tuple)
INSERTS = st.lists(st.tuples(st.integers(0, 3), PROMPTS, st.sampled_from(["", "a"])), max_size=25)


def ids(tokens: Tokens) -> np.ndarray:
    return np.array(tokens, np.int32)


def nodes(tree: PrefixTree) -> list[Node]:
    found, stack = [], [tree._root]
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(node.children.values())
    return found[1:]


def content(tree: PrefixTree) -> dict[int, set[tuple[str, Tokens]]]:
    """By replica: every token it holds, named by the path to it."""
    held: dict[int, set[tuple[str, Tokens]]] = {}
    stack: list[tuple[Node, Tokens]] = [(tree._root, ())]
    while stack:
        node, path = stack.pop()
        for child in node.children.values():
            assert child.parent is node and child.key[1] == child.tokens[0] and len(child.holders) > 0
            assert node is tree._root or set(child.holders) <= set(node.holders), "who holds a node holds its parents"
            whole = (*path, *child.tokens.tolist())
            for replica in child.holders:
                ends = range(len(path), len(whole))
                held.setdefault(replica, set()).update((child.key[0], whole[: end + 1]) for end in ends)
            stack.append((child, whole))
    assert {replica: size for replica, size in tree.sizes.items() if size} == {
        replica: len(tokens) for replica, tokens in held.items()
    }
    return held


@FEW
@given(INSERTS, PROMPTS, st.sampled_from(["", "a"]))
def test_match_is_the_longest_prefix_that_was_sent(
    inserts: list[tuple[int, Tokens, str]], asked: Tokens, extra_key: str
) -> None:
    tree, sent = PrefixTree(1000), []
    for replica, tokens, key in inserts:
        tree.insert(ids(tokens), replica, key)
        sent.append(Sent(replica, "", tokens, key))
    by_replica = {replica: [each for each in sent if each.replica == replica] for replica in range(4)}
    known = {
        replica: max((common(asked, each.tokens) for each in there if each.extra_key == extra_key), default=0)
        for replica, there in by_replica.items()
    }
    longest = max(known.values())
    matched, holders = tree.match(ids(asked), extra_key)
    assert matched == longest
    assert sorted(holders) == ([replica for replica, length in known.items() if length == longest] if longest else [])
    expected = {replica: prefixes(there) for replica, there in by_replica.items()}
    assert content(tree) == {replica: tokens for replica, tokens in expected.items() if tokens}


class Searching(PrefixTree):
    """Forgets the leaf that was sent longest ago, found by looking at all of them."""

    def _evict(self, replica: int) -> None:
        while self.sizes[replica] > self.max_tokens:
            held = [node for node in nodes(self) if replica in node.holders]
            leaves = [node for node in held if not any(replica in child.holders for child in node.children.values())]
            self._forget(min(leaves, key=lambda node: node.holders[replica]), replica)


def forgets_in_order(inserts: Sequence[tuple[int, Tokens, str]], max_tokens: int) -> None:
    quick, searching = PrefixTree(max_tokens), Searching(max_tokens)
    for replica, tokens, key in inserts:
        for tree in (quick, searching):
            tree.insert(ids(tokens), replica, key)
        held = content(quick)
        assert held == content(searching)
        assert all(size <= max_tokens for size in quick.sizes.values())
        if len(tokens) <= max_tokens:
            assert prefixes([Sent(replica, "", tokens, key)]) <= held.get(replica, set()), "the newest is kept"


@FEW
@given(INSERTS, st.integers(1, 12))
def test_least_recently_sent_leaves_are_forgotten(inserts: list[tuple[int, Tokens, str]], max_tokens: int) -> None:
    forgets_in_order(inserts, max_tokens)


@FEW
@given(INSERTS, INSERTS, st.integers(0, 3), st.integers(3, 12))
def test_a_dropped_replica_is_forgotten(
    before: list[tuple[int, Tokens, str]], after: list[tuple[int, Tokens, str]], gone: int, max_tokens: int
) -> None:
    """And the others keep what they had, and go on."""
    tree = PrefixTree(max_tokens)
    for replica, tokens, key in before:
        tree.insert(ids(tokens), replica, key)
    held = content(tree)
    tree.drop(gone)
    assert content(tree) == {replica: tokens for replica, tokens in held.items() if replica != gone}
    for replica, tokens, key in after:
        tree.insert(ids(tokens), replica, key)
        content(tree)
        assert all(size <= max_tokens for size in tree.sizes.values())


def test_a_tree_that_forgets_by_first_use_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: entries of the heap are believed, however old."""
    inserts = [(0, (0, 0, 0), ""), (0, (1, 1, 1), ""), (0, (0, 0, 0), ""), (0, (2, 2, 2), "")]
    forgets_in_order(inserts, 6)

    def evict(self: PrefixTree, replica: int) -> None:
        while self.sizes[replica] > self.max_tokens:
            _, _, node = heappop(self._leaves[replica])
            self._forget(node, replica)

    monkeypatch.setattr(PrefixTree, "_evict", evict)
    with pytest.raises(AssertionError):
        forgets_in_order(inserts, 6)


def test_leaves_are_offered_once() -> None:
    """A prompt larger than what is remembered leaves its beginning a leaf, again and again."""
    tree = PrefixTree(10)
    tree.insert(np.array([7] * 8, np.int32), 0)
    for number in range(200):
        tree.insert(np.array([7] * 8 + [number] * 4, np.int32), 0)
    assert tree.sizes == {0: 8}
    assert len(tree._leaves[0]) == 1
