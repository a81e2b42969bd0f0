"""Routing policies written for clarity: everything is computed anew from the whole history of what the router saw."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np

from testbed.messages import GenerateRequest, LoadReport, TokenPrompt
from testbed.workload.draw import Uniforms

Tokens = tuple[int, ...]


def request(rid: str, tokens: Sequence[int], extra_key: str = "", rank: int | None = None) -> GenerateRequest:
    return GenerateRequest(
        rid, TokenPrompt(np.array(tokens, np.int32)), 4, extra_key=extra_key, data_parallel_rank=rank
    )


class Sent(NamedTuple):
    replica: int
    rid: str
    tokens: Tokens
    extra_key: str = ""


class Reported(NamedTuple):
    replica: int
    report: LoadReport


class Ended(NamedTuple):
    rid: str


Event = Sent | Reported | Ended


class History:
    """What one router saw, in order."""

    def __init__(self, hears_ends: bool) -> None:
        self.events: list[Event] = []
        self.hears_ends = hears_ends

    def sent_to(self, replica: int) -> list[Sent]:
        return [event for event in self.events if isinstance(event, Sent) and event.replica == replica]

    def last_report(self, replica: int) -> tuple[int, LoadReport]:
        """The newest report by what it covers, and its place in the history; -1 and an empty one before the first."""
        newest = (-1, LoadReport(0, 0, 0, 0, 0, 0))
        for place, event in enumerate(self.events):
            if isinstance(event, Reported) and event.replica == replica:
                report = event.report
                if report.received >= newest[1].received and report.steps >= newest[1].steps:
                    newest = place, report
        return newest

    def load(self, replica: int) -> tuple[int, int]:
        """(requests, tokens) as far as the router can know."""
        place, report = self.last_report(replica)
        before = [event for event in self.events[: place + 1] if isinstance(event, Sent) and event.replica == replica]
        uncovered = before[report.received :]
        requests = report.running + report.waiting + len(uncovered)
        tokens = report.used_tokens + report.waiting_tokens + sum(len(sent.tokens) for sent in uncovered)
        here = {sent.rid: sent for sent in self.sent_to(replica)}
        for event in self.events[place + 1 :]:
            if isinstance(event, Sent) and event.replica == replica:
                requests, tokens = requests + 1, tokens + len(event.tokens)
            elif isinstance(event, Ended) and event.rid in here and self.hears_ends:
                requests, tokens = max(requests - 1, 0), max(tokens - len(here[event.rid].tokens), 0)
        return requests, tokens


def common(one: Tokens, other: Tokens) -> int:
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return same


class Model:
    """What ``policy`` chooses, by its definition."""

    def __init__(self, policy: str, seed: int, thresholds: tuple[float, int, float]) -> None:
        self.policy, self.thresholds = policy, thresholds
        name = "random" if policy == "random" else "power of two"
        self.numbers = iter(Uniforms(seed, "routing", name).take(1000).tolist())
        self.last = -1

    def choose(self, history: History, tokens: Tokens, extra_key: str, replicas: Sequence[int]) -> int:
        requests = {replica: history.load(replica)[0] for replica in replicas}
        if self.policy == "round_robin":
            self.last = min((replica for replica in replicas if replica > self.last), default=min(replicas))
            return self.last
        if self.policy == "random":
            return replicas[int(next(self.numbers) * len(replicas))]
        if self.policy == "shortest_queue":
            return min(replicas, key=lambda replica: (requests[replica], replica))
        if self.policy == "least_tokens":
            return min(replicas, key=lambda replica: (history.load(replica)[1], replica))
        if self.policy == "power_of_two":
            if len(replicas) == 1:
                return replicas[0]
            pairs = list(permutations(replicas, 2))
            pair = pairs[int(next(self.numbers) * len(pairs))]
            return min(pair, key=lambda replica: (requests[replica], replica))
        return self.by_prefix(history, tokens, extra_key, replicas, requests)

    def by_prefix(
        self, history: History, tokens: Tokens, extra_key: str, replicas: Sequence[int], requests: dict[int, int]
    ) -> int:
        share, absolute, relative = self.thresholds
        most, fewest = max(requests.values()), min(requests.values())
        if most - fewest > absolute and most > relative * fewest:
            return min(replicas, key=lambda replica: (requests[replica], replica))
        known = {
            replica: max(
                (common(tokens, sent.tokens) for sent in history.sent_to(replica) if sent.extra_key == extra_key),
                default=0,
            )
            for replica in replicas
        }
        longest = max(known.values())
        if longest > share * len(tokens):
            best = [replica for replica in replicas if known[replica] == longest]
            return min(best, key=lambda replica: (requests[replica], replica))
        return min(replicas, key=lambda replica: (len(prefixes(history.sent_to(replica))), replica))


def prefixes(sent: Sequence[Sent]) -> set[tuple[str, Tokens]]:
    """Every token of the tree, each named by the path to it."""
    return {(each.extra_key, each.tokens[: end + 1]) for each in sent for end in range(len(each.tokens))}
