"""An HTTP worker's process: uvicorn in front of the scheduler's sockets.

``python -m testbed.server.worker FD``
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from tokenizers import Tokenizer

from testbed.scenario.errors import InputError
from testbed.server import wire
from testbed.server.app import Api, Keys, build_app
from testbed.server.calls import Calls
from testbed.server.connection import ClientConnection
from testbed.server.options import ServeOptions
from testbed.server.part import Part, run_part
from testbed.server.protocol.chat import load_chat_template
from testbed.server.protocol.generation import Served
from testbed.server.service import Service

BACKLOG = 2048
"""Connections that may wait to be accepted."""
LAST_WORDS_S = 1.0
"""For replies to requests that were aborted at the end of a drain."""


class HttpServer(uvicorn.Server):
    """Signals are the parent's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn."""
        yield


def serve(part: Part) -> None:
    """Answer HTTP until the parent asks to end, or is gone. Raises InputError."""
    uvloop.run(_serve(part))


async def _serve(part: Part) -> None:
    start = part.start
    options, ready = start.options, start.scheduler
    assert ready is not None
    tokenizer = Tokenizer.from_file(str(Path(options.tokenizer) / "tokenizer.json"))
    served = Served(
        names=options.names,
        vocab_size=ready.vocab_size,
        context_tokens=ready.context_tokens,
        template=load_chat_template(Path(options.tokenizer)),
        limits=options.limits,
    )
    calls = Calls(start.number, options.workers, start.folder, options.max_open(ready.max_running_requests))
    calls.listen()
    service = Service(served, tokenizer, calls, options.waits, modelled=options.backend == "paced")
    keys = Keys(options.api_key, options.admin_key)
    server = HttpServer(_config(options, build_app(Api(service, start, keys), keys, service)))
    loop, told = asyncio.get_running_loop(), asyncio.Event()

    def drain_now() -> None:
        loop.call_soon_threadsafe(told.set)

    part.watch(drain_now)
    listener = _listening(start.listener_fd)
    drain = asyncio.create_task(_drain(told, server, service))
    announce = asyncio.create_task(_announce(part, server))
    gc.collect()
    gc.freeze()  # what lives as long as the server is looked at no more
    await server.serve(sockets=[listener])
    for task in (drain, announce):
        task.cancel()
    calls.close()


def _listening(descriptor: int) -> socket.socket:
    """The socket that the parent has bound. Raises InputError when somebody else was faster to listen."""
    listener = socket.socket(fileno=os.dup(descriptor))
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        message = f"the port cannot be listened on: {error.strerror}"
        raise InputError(message, where="--port", remedy="name another one, or 0 for any that is free") from None
    return listener


def _config(options: ServeOptions, app: Any) -> uvicorn.Config:
    connection = partial(
        ClientConnection,
        connections=-(-options.connections // options.workers),
        header_s=options.waits.header_s,
        body_s=options.waits.body_s,
        write_s=options.waits.write_s,
        header_bytes=options.header_bytes,
    )
    return uvicorn.Config(
        app,
        http=connection,  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=options.waits.idle_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=LAST_WORDS_S,  # type: ignore[arg-type]
    )


async def _announce(part: Part, server: HttpServer) -> None:
    """Tell the parent when connections are accepted."""
    while not server.started:
        await asyncio.sleep(0.01)
    part.tell(wire.Ready())


async def _drain(told: asyncio.Event, server: HttpServer, service: Service) -> None:
    """When told to: turn new requests away, wait for those that run, then end."""
    await told.wait()
    service.draining = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(service.waits.drain_s):
            while service.busy:
                await asyncio.sleep(0.02)
    service.calls.abandon_all()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            while service.busy:
                await asyncio.sleep(0.02)
    server.should_exit = True


if __name__ == "__main__":
    run_part(serve)
