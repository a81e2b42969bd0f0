"""Requests whose grammar is not compiled: accepted and open, but no decision looks at them."""

from __future__ import annotations

from testbed.messages import GrammarSpec
from testbed.request import Request


class GrammarQueue:
    """Where requests with a grammar wait before they wait for memory, and what the loop has to say about grammars."""

    def __init__(self) -> None:
        self.compiling: dict[int, Request] = {}
        """By rank."""
        self.open = 0
        """Requests with a grammar that have not ended, wherever they are."""
        self.orders: list[tuple[int, GrammarSpec | None]] = []
        """(rank, the grammar to compile; None: the request has ended) in order; the loop hands them on."""

    def __len__(self) -> int:
        return len(self.compiling)

    def add(self, request: Request) -> None:
        """A request with a grammar is accepted."""
        self.open += 1
        self.compiling[request.rank] = request
        self.orders.append((request.rank, request.grammar))

    def take(self, rank: int) -> Request | None:
        """The request leaves the queue; None if it is not here: it waits for memory or runs already, or has ended."""
        return self.compiling.pop(rank, None)

    def ended(self, request: Request) -> None:
        """A request with a grammar has ended."""
        self.open -= 1
        self.orders.append((request.rank, None))
