"""The router in front of prefill and decode engines (SGLang's mini load balancer, specification G.3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from msgspec.structs import replace

from testbed.messages import AbortRequest, GenerateRequest, Message, Pair, RequestOutput
from testbed.request import NO_TOKENS, FinishReason
from testbed.workload.draw import Uniforms


class Lost(NamedTuple):
    """What the loss of an engine sets off."""

    ended: list[RequestOutput]
    """For the clients of its requests."""
    sent: list[tuple[str, Message]]
    """What to send to which engine."""


class _Open:
    """A request that has no answer yet."""

    __slots__ = ("pair", "prompt_tokens", "times")

    def __init__(self, request: GenerateRequest, pair: Pair) -> None:
        self.pair = pair
        self.prompt_tokens = len(request.prompt)
        self.times = 1
        """How often a request with this id was sent: each of them ends, the second by a refusal."""


class PairRouter:
    """Chooses a prefill and a decode engine for each request, at random, and a room; sends the request to both, and
    answers with what the decode engine says. What becomes of the prefill half is told to nobody: where it fails, the
    decode half does. The caller carries the messages."""

    def __init__(self, prefills: Iterable[str], decodes: Iterable[str], seed: int) -> None:
        """The names of the engines; one of each kind at least."""
        self._prefills = list(prefills)
        self._decodes = list(decodes)
        self._pairs = Uniforms(seed, "pairs")
        self._next_room = int(Uniforms(seed, "rooms").take(1)[0] * 2**53)
        """Counted from a place of this router's own: no two requests share a room."""
        self._open: dict[str, _Open] = {}

    def route(self, request: GenerateRequest) -> list[tuple[str, GenerateRequest]]:
        """What to send to which engine. An id that is open goes to where it is, to be refused there."""
        known = self._open.get(request.rid)
        if known is None:
            prefill, decode = self._pairs.take(2).tolist()
            pair = Pair(
                self._next_room,
                self._prefills[int(prefill * len(self._prefills))],
                self._decodes[int(decode * len(self._decodes))],
            )
            self._next_room += 1
            known = self._open[request.rid] = _Open(request, pair)
        else:
            known.times += 1
        sent = replace(request, pair=known.pair)
        return [(known.pair.prefill, sent), (known.pair.decode, sent)]

    def abort(self, message: AbortRequest) -> list[tuple[str, AbortRequest]]:
        """To both halves; unknown ids to nobody."""
        if message.abort_all:
            return [(engine, message) for engine in [*self._prefills, *self._decodes]]
        known = self._open.get(message.rid)
        return [] if known is None else [(known.pair.prefill, message), (known.pair.decode, message)]

    def ended(self, engine: str, output: RequestOutput) -> RequestOutput | None:
        """The answer for the client, if this is one: what the decode engine says."""
        known = self._open.get(output.rid)
        if known is None or known.pair.decode != engine:
            return None
        known.times -= 1
        if known.times == 0:
            del self._open[output.rid]
        return output

    def lost(self, engine: str) -> Lost:
        """An engine is gone, and with it what it had. Its decode requests end here, and their prefill halves are told.
        Where it was a prefill engine, the decode halves know better: they may have all they need, or their lease ends.
        """
        ended: list[RequestOutput] = []
        sent: list[tuple[str, Message]] = []
        for rid, known in list(self._open.items()):
            if known.pair.decode == engine:
                del self._open[rid]
                reason = str(FinishReason.ERROR)
                output = RequestOutput(rid, reason, f"{engine} is gone", 502, known.prompt_tokens, 0, NO_TOKENS)
                ended += known.times * [output]
                sent.append((known.pair.prefill, AbortRequest(rid)))
        return Lost(ended, sent)
