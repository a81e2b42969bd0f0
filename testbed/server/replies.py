"""From what the scheduler's side says of a request's choices to the reply in the protocol that it came in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from testbed.server.protocol import native, responses
from testbed.server.protocol.errors import of_end
from testbed.server.protocol.generation import Call, Generation
from testbed.server.protocol.responses import Choice, Head, TokenLogprob, TopToken, Usage
from testbed.server.protocol.tools import ForcedCalls, HermesCalls, ToolUse, parse_calls
from testbed.server.wire import Delta, Finished, RowLogprobs

RETRY_AFTER_S = 1
"""What a client that is turned away is told to wait."""
TokenBytes = Callable[[int], bytes]
"""A token's own bytes."""


class Continuation:
    """One choice, as far as it has come."""

    def __init__(self, index: int, name: str, rid: str, generation: Generation, prompt_ids: NDArray[np.int32]) -> None:
        """``name``: of its request, as the client knows it; ``rid``: its own, as the scheduler knows it."""
        self.index, self.name, self.rid = index, name, rid
        self.generation, self.prompt_ids = generation, prompt_ids
        self.texts: list[str] = []
        self.output_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finished: Finished | None = None
        self.chars = 0
        """Characters of text, the echoed prompt's included, that a stream has told."""
        self.told = 0
        """Log-probabilities that a stream has told."""
        self.parser: HermesCalls | ForcedCalls | None = None
        """Of tool calls in a stream."""
        self.calls = 0
        """Tool calls that a stream has told."""

    def add(self, delta: Delta, token_bytes: TokenBytes) -> None:
        """More of it has come. Raises ApiError if it ended in an error."""
        self.texts.append(delta.text)
        self.output_ids += delta.token_ids
        if delta.logprobs is not None:
            found = zip(delta.token_ids, delta.logprobs, strict=True)
            self.logprobs += [_token(token, row, token_bytes) for token, row in found]
        self.finished = delta.finished
        if delta.finished is not None and delta.finished.reason == "error":
            raise of_end(delta.finished.status, delta.finished.message, RETRY_AFTER_S)

    def untold_logprobs(self) -> list[TokenLogprob] | None:
        """What a stream has not told of them; None when nobody asked."""
        if not self.generation.return_logprob:
            return None
        untold = self.logprobs[self.told :]
        self.told = len(self.logprobs)
        return untold

    def choice(
        self, text: str, logprobs: Sequence[TokenLogprob] | None, token_ids: Sequence[int] | None = None
    ) -> Choice:
        """The protocol's form of a stretch of it, or of all."""
        end = self.finished
        return Choice(
            self.index,
            text,
            reason=None if end is None else end.reason,
            matched=None if end is None else end.matched,
            logprobs=logprobs,
            token_ids=token_ids,
            message="" if end is None else end.message,
            status=200 if end is None else end.status,
        )

    def prompt_logprobs(self, token_bytes: TokenBytes) -> list[TokenLogprob]:
        """Of the prompt's tokens from ``logprob_start`` on; nothing predicts that one itself."""
        if self.finished is None or self.finished.prompt_logprobs is None:
            return []
        start = self.generation.logprob_start
        values = np.frombuffer(self.finished.prompt_logprobs, np.float32)[start:].tolist()
        ids = self.prompt_ids[start:].tolist()
        return [
            TokenLogprob(token, token_bytes(token), None if math.isnan(value) else value)
            for token, value in zip(ids, values, strict=True)
        ]


def _token(token: int, row: RowLogprobs, token_bytes: TokenBytes) -> TokenLogprob:
    top = tuple(TopToken(one, token_bytes(one), value) for one, value in zip(row.top_ids, row.top, strict=True))
    return TokenLogprob(token, token_bytes(token), row.token, top)


@dataclass(frozen=True, slots=True)
class Asked:
    """One HTTP request, on its way."""

    name: str
    """Its id, as the client will know it."""
    call: Call
    choices: tuple[Continuation, ...]
    token_bytes: TokenBytes
    prompt_texts: tuple[str, ...]
    """Of each prompt, where it is to be echoed."""
    created: int
    """Unix time, s."""
    began_s: float
    """By ``time.monotonic``."""

    def usage(self) -> Usage:
        """So far: a prompt counts once, however many choices it has."""
        heads = [choice for choice in self.choices if choice.index % choice.generation.n == 0]
        return Usage(
            prompt_tokens=sum(len(choice.prompt_ids) for choice in heads),
            completion_tokens=sum(len(choice.output_ids) for choice in self.choices),
            cached_tokens=sum(choice.finished.cached_tokens for choice in heads if choice.finished is not None),
        )


class Form(Protocol):
    """The replies of a protocol."""

    def whole(self) -> object:
        """The reply, when all has come."""
        ...

    def first(self) -> bytes:
        """The beginning of a stream."""
        ...

    def chunk(self, choice: Continuation, delta: Delta) -> bytes:
        """What a stream says of ``delta``, which was added to ``choice``."""
        ...

    def last(self) -> bytes:
        """The end of a stream, behind all chunks."""
        ...


class CompletionForm:
    """``/v1/completions``."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._head = Head(f"cmpl-{asked.name}", asked.created, asked.call.model)

    def whole(self) -> object:
        """See Form."""
        asked = self._asked
        choices = [self._whole(choice) for choice in asked.choices]
        return responses.completion(self._head, choices, asked.usage(), asked.call.cached_details)

    def _whole(self, choice: Continuation) -> Choice:
        generation, logprobs = choice.generation, None
        if generation.return_logprob:
            logprobs = [*choice.prompt_logprobs(self._asked.token_bytes), *choice.logprobs]
        text = self._echo(choice) + "".join(choice.texts)
        return choice.choice(text, logprobs, _told_ids(self._asked, choice.output_ids))

    def _echo(self, choice: Continuation) -> str:
        return self._asked.prompt_texts[choice.index // choice.generation.n] if choice.generation.echo else ""

    def first(self) -> bytes:
        """See Form: the prompts, where they are echoed."""
        parts = []
        for choice in self._asked.choices:
            if echo := self._echo(choice):
                parts.append(responses.completion_event(self._head, Choice(choice.index, echo), self._usage()))
                choice.chars = len(echo)
        return b"".join(parts)

    def chunk(self, choice: Continuation, delta: Delta) -> bytes:
        """See Form."""
        made = choice.choice(delta.text, choice.untold_logprobs(), _told_ids(self._asked, delta.token_ids))
        made = replace(made, text_offset=choice.chars)
        choice.chars += len(delta.text)
        return responses.completion_event(self._head, made, self._usage())

    def _usage(self) -> dict[str, object]:
        return _usage_of_chunk(self._asked)

    def last(self) -> bytes:
        """See Form."""
        asked = self._asked
        if not asked.call.include_usage:
            return responses.DONE
        usage = responses.completion_usage_event(self._head, asked.usage(), asked.call.cached_details)
        return usage + responses.DONE


class ChatForm:
    """``/v1/chat/completions``."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._head = Head(f"chatcmpl-{asked.name}", asked.created, asked.call.model)

    def whole(self) -> object:
        """See Form."""
        asked = self._asked
        choices = [self._whole(choice) for choice in asked.choices]
        return responses.chat(self._head, choices, asked.usage(), asked.call.cached_details)

    def _whole(self, choice: Continuation) -> Choice:
        logprobs = choice.logprobs if choice.generation.return_logprob else None
        made = choice.choice("".join(choice.texts), logprobs, _told_ids(self._asked, choice.output_ids))
        if self._asked.call.tools is None:
            return made
        parsed = parse_calls(self._asked.call.tools, made.text)
        return replace(made, text=parsed.content, calls=parsed.calls)

    def first(self) -> bytes:
        """See Form: who speaks."""
        usage = _usage_of_chunk(self._asked)
        return b"".join(responses.chat_first_event(self._head, choice.index, usage) for choice in self._asked.choices)

    def chunk(self, choice: Continuation, delta: Delta) -> bytes:
        """See Form."""
        made = choice.choice(delta.text, choice.untold_logprobs(), _told_ids(self._asked, delta.token_ids))
        if self._asked.call.tools is not None:
            made = self._with_calls(choice, made, self._asked.call.tools)
        return responses.chat_event(self._head, made, _usage_of_chunk(self._asked))

    def _with_calls(self, choice: Continuation, made: Choice, tools: ToolUse) -> Choice:
        """Text that may be the beginning of a call is kept back until that is decided."""
        if choice.parser is None:
            choice.parser = tools.parser()
        parsed = choice.parser.push(made.text)
        content, calls = parsed.content, parsed.calls
        if choice.finished is not None:
            rest = choice.parser.finish()
            content, calls = content + rest.content, calls + rest.calls
        made = replace(made, text=content, calls=calls, first_call=choice.calls)
        choice.calls += len(calls)
        return made

    def last(self) -> bytes:
        """See Form."""
        asked = self._asked
        if not asked.call.include_usage:
            return responses.DONE
        return responses.chat_usage_event(self._head, asked.usage(), asked.call.cached_details) + responses.DONE


class NativeForm:
    """``/generate``. Every chunk of a stream has all text so far, as SGLang sends it."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._many = asked.call.batch or len(asked.choices) > 1

    def whole(self) -> object:
        """See Form."""
        replies = [self._reply(choice) for choice in self._asked.choices]
        return replies if self._many else replies[0]

    def _reply(self, choice: Continuation) -> dict[str, object]:
        generation, asked, end = choice.generation, self._asked, choice.finished
        prompt = choice.prompt_logprobs(asked.token_bytes)
        return native.generate_reply(
            choice.name,
            choice.choice("".join(choice.texts), choice.logprobs if generation.return_logprob else None),
            choice.output_ids,
            len(choice.prompt_ids),
            0 if end is None else end.cached_tokens,
            None if end is None else time.monotonic() - asked.began_s,
            prompt,
        )

    def first(self) -> bytes:
        """See Form: nothing."""
        return b""

    def chunk(self, choice: Continuation, delta: Delta) -> bytes:
        """See Form."""
        return native.generate_event(self._reply(choice), choice.index if self._many else None)

    def last(self) -> bytes:
        """See Form."""
        return responses.DONE


def _told_ids(asked: Asked, token_ids: Sequence[int]) -> Sequence[int] | None:
    return token_ids if asked.call.token_ids else None


def _usage_of_chunk(asked: Asked) -> dict[str, object]:
    call = asked.call
    return responses.usage_field(call.include_usage, asked.usage() if call.continuous_usage else None)
