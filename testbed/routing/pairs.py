"""The router in front of prefill and decode engines (SGLang's mini load balancer, specification G.3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from msgspec.structs import replace

from testbed.messages import AbortRequest, GenerateRequest, Message, Pair, RequestOutput
from testbed.request import NO_TOKENS, FinishReason
from testbed.workload.draw import Uniforms


class Step(NamedTuple):
    """What the router does about something."""

    sent: list[tuple[str, Message]]
    """Messages, and the engine that each is for."""
    answers: list[RequestOutput]
    """For clients."""


class _Open:
    """A request that has no answer yet."""

    __slots__ = ("pair", "prompt_tokens")

    def __init__(self, request: GenerateRequest, pair: Pair) -> None:
        self.pair = pair
        self.prompt_tokens = len(request.prompt)


class PairRouter:
    """Chooses a prefill and a decode engine for each request, at random, and a room; sends the request to both, and
    answers with what the decode engine says. A prefill half that fails before it has made its token cannot be continued
    by anybody: then that is the answer, for the decode half may have been lost on its way. The caller carries the
    messages."""

    def __init__(self, prefills: Iterable[str], decodes: Iterable[str], seed: int) -> None:
        """The names of the engines; one of each kind at least."""
        self._prefills = list(prefills)
        self._decodes = list(decodes)
        self._pairs = Uniforms(seed, "pairs")
        self._next_room = int(Uniforms(seed, "rooms").take(1)[0] * 2**53)
        """Counted from a place of this router's own: no two requests share a room."""
        self._open: dict[str, _Open] = {}

    def submit(self, request: GenerateRequest) -> Step:
        """A client's request; one whose id is open is refused."""
        if request.rid in self._open:
            why = f"a request with the id {request.rid!r} is being served"
            return Step([], [_error(request.rid, len(request.prompt), why, 400)])
        prefill, decode = self._pairs.take(2).tolist()
        pair = Pair(
            self._next_room,
            self._prefills[int(prefill * len(self._prefills))],
            self._decodes[int(decode * len(self._decodes))],
        )
        self._next_room += 1
        self._open[request.rid] = _Open(request, pair)
        paired = replace(request, pair=pair)
        return Step([(pair.prefill, paired), (pair.decode, paired)], [])

    def abort(self, message: AbortRequest) -> Step:
        """To both halves; unknown ids to nobody."""
        if message.abort_all:
            return Step([(engine, message) for engine in [*self._prefills, *self._decodes]], [])
        known = self._open.get(message.rid)
        return Step([] if known is None else [(known.pair.prefill, message), (known.pair.decode, message)], [])

    def ended(self, engine: str, output: RequestOutput) -> Step:
        """An engine has ended its half of a request."""
        known = self._open.get(output.rid)
        if known is None or engine not in (known.pair.prefill, known.pair.decode):
            return Step([], [])
        if engine == known.pair.decode:
            del self._open[output.rid]
            return Step([], [output])
        if output.status == 200 or len(output.output_ids):
            return Step([], [])
        del self._open[output.rid]
        return Step([(known.pair.decode, AbortRequest(output.rid))], [output])

    def lost(self, engine: str) -> Step:
        """An engine is gone, and with it what it had. Its decode requests end here, and their prefill halves are told.
        Where it was a prefill engine, the decode halves know better: they may have all they need, or their lease ends.
        """
        step = Step([], [])
        for rid, known in list(self._open.items()):
            if known.pair.decode == engine:
                del self._open[rid]
                step.answers.append(_error(rid, known.prompt_tokens, f"{engine} is gone", 502))
                step.sent.append((known.pair.prefill, AbortRequest(rid)))
        return step


def _error(rid: str, prompt_tokens: int, message: str, status: int) -> RequestOutput:
    return RequestOutput(rid, str(FinishReason.ERROR), message, status, prompt_tokens, 0, NO_TOKENS)
