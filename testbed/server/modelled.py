"""How long the outputs of a modelled device are: what a model would decide by its end of sequence is drawn here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from testbed.deployment import Engine
from testbed.messages import GenerateRequest
from testbed.runtime.oracle import Oracle
from testbed.scenario.workload import IndependentLengths
from testbed.tokens import oracle_key, token_ids
from testbed.workload.base import TimedRequest
from testbed.workload.draw import Uniforms, whole_tokens
from testbed.workload.lengths import quantiles_of


class ModelledLengths:
    """Tells the oracle of every request where it ends.

    Its tokens are those that the tokenizer knows, so that they have a text. A request that ignores the end of sequence
    goes on to its ``max_new_tokens``; another one ends at a length that follows from the seed and its id, by the
    distribution that the server was started with. Both end at a token of their ``stop_token_ids``, if the oracle
    happens to say one, but not before ``min_new_tokens``.
    """

    def __init__(self, engine: Engine, tokenizer: str) -> None:
        """``tokenizer``: its folder."""
        known = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json")).get_vocab_size()
        self._vocab_size = min(engine.model.vocab, known)
        self._seed = engine.scenario.seed
        self._longest = engine.scheduler.max_request_tokens
        self.oracle = Oracle(self._seed, self._vocab_size, engine.scheduler.memory.slots.count)
        lengths = engine.scenario.workload.lengths
        assert isinstance(lengths, IndependentLengths)
        self._quantiles = quantiles_of(lengths.output_tokens, Path.cwd(), "output_tokens", whole=True)

    def expect(self, request: GenerateRequest) -> None:
        """A request was sent."""
        most = self._longest if request.max_new_tokens is None else min(request.max_new_tokens, self._longest)
        tokens = most
        if not request.ignore_eos:
            drawn = int(whole_tokens(self._quantiles(Uniforms(self._seed, "output", request.rid).take(1)))[0])
            tokens = min(max(drawn, request.sampling.min_new_tokens, 1), most)
        if request.sampling.stop_token_ids:
            tokens = self._first_stop(request, tokens)
        if tokens < most:
            self.oracle.expect(TimedRequest(0, request, tokens))

    def forget(self, rid: str) -> None:
        """A request has ended."""
        self.oracle.forget(rid)

    def _first_stop(self, request: GenerateRequest, tokens: int) -> int:
        """Outputs up to the first of its stop tokens; at most ``tokens``."""
        outputs = token_ids(oracle_key(self._seed, request.rid), 0, tokens, self._vocab_size)
        is_stop = np.isin(outputs, request.sampling.stop_token_ids)
        is_stop[: max(request.sampling.min_new_tokens - 1, 0)] = False
        return int(is_stop.argmax()) + 1 if is_stop.any() else tokens
