"""What a worker does with a request to generate: read, tokenise, open, wait, reply."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer

from testbed.messages import GenerateRequest, TextOptions, TokenPrompt
from testbed.server.calls import Calls, Gone, Mailbox
from testbed.server.detokenize import Vocabulary
from testbed.server.options import Waits
from testbed.server.protocol import responses
from testbed.server.protocol.errors import ApiError, of_end, too_large
from testbed.server.protocol.generation import Call, Generation, Served, check_prompts
from testbed.server.replies import RETRY_AFTER_S, Asked, Continuation, Form
from testbed.server.wire import Delta

INLINE_BYTES = 16 << 10
"""A longer body is parsed, and longer text tokenised, in a thread: others are not to wait for it."""
VALUE_BYTES = 64
"""Of a log-probability in a reply: as JSON it is at least so long. Replies with many are written in a thread too."""
CLOSED_REQUEST = 499
"""The status of a reply that nobody reads (nginx's)."""


def late() -> ApiError:
    """The scheduler does not answer in time."""
    return ApiError("The engine did not answer in time; try again.", status=503, retry_after_s=RETRY_AFTER_S)


Parse = Callable[[bytes, Served], Call]
FormOf = Callable[[Asked], Form]


class Service:
    """One worker's."""

    def __init__(self, served: Served, tokenizer: Tokenizer, calls: Calls, waits: Waits, modelled: bool) -> None:
        """``modelled``: nothing computes logits."""
        self.served, self.calls, self.waits = served, calls, waits
        self._modelled = modelled
        self._tokenizer = tokenizer
        self._token_bytes = Vocabulary(tokenizer).token_bytes
        self.draining = False
        """The server is about to end: nothing new is taken."""
        self.busy = 0
        """Requests that were taken and have not been replied to."""

    def check_open(self) -> None:
        """Whether anything is taken at all. Raises ApiError."""
        if self.draining:
            message = "The server is about to end; ask another one."
            raise ApiError(message, status=503, code="draining", retry_after_s=RETRY_AFTER_S)

    def state(self) -> dict[str, int]:
        """What is open in this process: requests that were not replied to, those that the scheduler has not ended, and
        tasks of the event loop."""
        return {
            "number": self.calls.number,
            "busy": self.busy,
            "open_requests": self.calls.open,
            "tasks": len(asyncio.all_tasks()),
        }

    async def generate(self, request: Request, parse: Parse, form_of: FormOf) -> Response:
        """The reply to a request, as one piece or as a stream. Raises ApiError."""
        began_s = time.monotonic()
        self.check_open()
        self.calls.check_room(1)
        body = await self.read_body(request)
        self.check_open()
        self.busy += 1  # from here on the server's end waits for it
        try:
            asked = await self._read(body, parse, began_s)
            mailbox = self.calls.send([(one.name, _request(one, asked.call.stream)) for one in asked.choices])
        except BaseException:
            self.busy -= 1
            raise
        reply = Reply(self, asked, form_of(asked), mailbox, asyncio.create_task(_watch(request, mailbox)))
        try:
            await reply.begin()
        except BaseException:
            reply.end()
            raise
        return reply

    async def _read(self, body: bytes, parse: Parse, began_s: float) -> Asked:
        """What a body asks for, tokenised. Raises ApiError."""
        call = await _aside(len(body), parse, body, self.served)
        self._check_supported(call)
        prompts, echoes = await self._tokenised(call)
        return self._asked(call, prompts, echoes, began_s)

    def _check_supported(self, call: Call) -> None:
        """What the protocol can say and this server cannot do. Raises ApiError."""
        if any(generation.return_logprob for generation in call.generations):
            name = call.logprobs_name
            if self._modelled:
                message = f"{name} cannot be had: this server models a device, it computes no probabilities."
                raise ApiError(message, param=name, code="not_supported")
            if call.stream and any(generation.echo for generation in call.generations):
                message = "echo with logprobs cannot be streamed: the prompt's are known at the end only."
                raise ApiError(message, param="echo", code="not_supported")

    async def probe(self) -> None:
        """Generate one token. Raises ApiError when none comes in time."""
        self.check_open()
        request = GenerateRequest(
            rid=self.calls.rid(name := uuid.uuid4().hex, 0),
            prompt=TokenPrompt(np.zeros(1, np.int32)),
            max_new_tokens=1,
            stream=False,
            text=TextOptions(),
        )
        mailbox = self.calls.send([(name, request)])
        try:
            async with asyncio.timeout(self.waits.answer_s):
                finished = (await mailbox.take())[-1].finished
        except TimeoutError:
            raise late() from None
        finally:
            self.calls.abandon([request.rid])
        if finished is not None and finished.reason == "error":
            raise of_end(finished.status, finished.message, RETRY_AFTER_S)

    async def read_body(self, request: Request) -> bytes:
        """The body. Raises ApiError for one that is too long, too slow, or not JSON by its own account."""
        headers = request.headers
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError("The body must be JSON, with Content-Type: application/json.", status=415)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError("The body must not be compressed.", status=415)
        most = self.served.limits.body_bytes
        if int(headers.get("content-length", "0")) > most:
            raise too_large(most)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.waits.body_s):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        raise too_large(most)
        except TimeoutError:
            raise ApiError("The body took too long.", status=408) from None
        except ClientDisconnect:
            raise Gone from None
        return b"".join(parts)

    async def _tokenised(self, call: Call) -> tuple[list[NDArray[np.int32]], list[str]]:
        """(prompts, the texts of those that are to be echoed, else ''). Raises ApiError."""
        generations = call.generations
        size = sum(len(one.prompt) for one in generations if one.echo or isinstance(one.prompt, str))
        prompts: list[NDArray[np.int32]] = await _aside(size, self._token_ids, generations)
        check_prompts(prompts, call, self.served)
        return prompts, await _aside(size, self._echoes, generations)

    def _token_ids(self, generations: Sequence[Generation]) -> list[NDArray[np.int32]]:
        return [
            one.prompt if not isinstance(one.prompt, str) else self._encoded(one.prompt, one.add_special_tokens)
            for one in generations
        ]

    def _encoded(self, text: str, add_special_tokens: bool) -> NDArray[np.int32]:
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        return np.array(encoding.ids, np.int32)

    def _echoes(self, generations: Sequence[Generation]) -> list[str]:
        return [
            "" if not one.echo else one.prompt if isinstance(one.prompt, str) else self._decoded(one.prompt)
            for one in generations
        ]

    def _decoded(self, prompt: NDArray[np.int32]) -> str:
        text: str = self._tokenizer.decode(prompt.tolist(), skip_special_tokens=False)
        return text

    def _asked(self, call: Call, prompts: Sequence[NDArray[np.int32]], echoes: Sequence[str], began_s: float) -> Asked:
        name = uuid.uuid4().hex
        choices: list[Continuation] = []
        for place, (generation, prompt) in enumerate(zip(call.generations, prompts, strict=True)):
            own = call.rids[place] if call.rids else f"{name}-{place}" if place else name
            for choice in range(generation.n):
                rid = self.calls.rid(own, choice)
                choices.append(Continuation(len(choices), own, rid, generation, prompt))
        name, created = choices[0].name, int(time.time())
        return Asked(name, call, tuple(choices), self._token_bytes, tuple(echoes), created, began_s)


class Reply(Response):
    """The reply to one request to generate: waits for what comes, and goes on sending it if it is a stream."""

    def __init__(self, service: Service, asked: Asked, form: Form, mailbox: Mailbox, watch: asyncio.Task[None]) -> None:
        # Starlette's own constructor would ask for the body, which is not there yet.
        self._service, self._asked, self._form, self._mailbox, self._watch = service, asked, form, mailbox, watch
        self._choices = {choice.rid: choice for choice in asked.choices}
        self._left = len(self._choices)
        """Choices that have not finished."""
        self._first = b""
        self.background = None
        self.status_code = 200

    async def begin(self) -> None:
        """Wait for the whole reply, or for the first of a stream. Raises ApiError and Gone, before anything is sent."""
        if self._asked.call.stream:
            deltas = await self._mailbox.take()
            for delta in deltas:
                if delta.finished is not None and delta.finished.reason == "error":
                    self._choices[delta.rid].add(delta, self._asked.token_bytes)
            self._first = self._form.first() + self._chunks(deltas)
            return
        while self._left:
            for delta in await self._mailbox.take():
                self._add(delta)

    def _add(self, delta: Delta) -> Continuation:
        choice = self._choices[delta.rid]
        choice.add(delta, self._asked.token_bytes)
        self._left -= delta.finished is not None
        return choice

    def _chunks(self, deltas: Sequence[Delta]) -> bytes:
        return b"".join([self._form.chunk(self._add(delta), delta) for delta in deltas])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            if self._asked.call.stream:
                await self._send_stream(send)
            else:
                await self._send_whole(send)
        except Gone:
            pass
        finally:
            self.end()

    async def _send_whole(self, send: Send) -> None:
        choices = self._asked.choices
        values = sum(len(choice.logprobs) * (1 + choice.generation.top_logprobs) for choice in choices)
        body: bytes = await _aside(values * VALUE_BYTES, self._whole)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send_part(send, body, more=False)

    def _whole(self) -> bytes:
        return msgspec.json.encode(self._form.whole())

    async def _send_stream(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        data = self._first
        try:
            while self._left:
                await _send_part(send, data, more=True)
                data = self._chunks(await self._mailbox.take())
            data += self._form.last()
        except ApiError as error:
            data = responses.error_event(error) + responses.DONE
        await _send_part(send, data, more=False)

    def end(self) -> None:
        """Nothing more is sent; what has not ended is aborted."""
        self._service.calls.abandon(self._choices)
        self._watch.cancel()
        self._service.busy -= 1


async def _send_part(send: Send, data: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def _watch(request: Request, mailbox: Mailbox) -> None:
    """Close the mailbox when the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    mailbox.close()


async def _aside(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function``; in a thread if its input is long."""
    if size <= INLINE_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


def _request(choice: Continuation, stream: bool) -> GenerateRequest:
    """As the scheduler takes it."""
    generation = choice.generation
    return GenerateRequest(
        rid=choice.rid,
        prompt=TokenPrompt(choice.prompt_ids),
        max_new_tokens=generation.max_new_tokens,
        ignore_eos=generation.ignore_eos,
        priority=generation.priority,
        extra_key=generation.extra_key,
        stream=stream,
        sampling=generation.sampling_of(choice.index % generation.n),
        return_logprob=generation.return_logprob,
        top_logprobs=generation.top_logprobs,
        logprob_start=generation.logprob_start,
        text=generation.text,
        grammar=generation.grammar,
    )
