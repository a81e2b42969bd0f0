"""The parent of a server's parts: it starts them, watches them, and ends them in order."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import FrameType

from testbed.engine.process import ending
from testbed.scenario.errors import InputError
from testbed.server import wire
from testbed.server.options import ServeOptions

DYING_S = 5.0
"""How long a part may take to end once it has closed its socket, or was told to when nothing is open."""
SAVING_S = 600.0
"""How long the scheduler may write its run, where it was recorded."""
TWICE_S = 0.2
"""Signals that come so close are one: ``timeout`` and ``uv run`` pass on what the whole process group was told."""
LONGEST_FOLDER_BYTES = 90
"""The path of a socket has at most 107 bytes (unix(7)), of which the longest name, ``/replies-63``, takes 11."""
LATE_S = 5.0
"""How much later than its own deadline a worker may be done with its requests."""


class PartLost(InputError):
    """A part of the server ended by itself."""

    def __init__(self, part: str, ending: str) -> None:
        super().__init__(
            f"the {part} {ending}",
            where="serve",
            remedy="start the server again; if it was killed for memory, lower engine.kv_tokens or the model's size",
        )


class Ended(Exception):
    """Somebody wants the server to end: a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Child:
    """A part, as the parent sees it."""

    def __init__(self, module: str, name: str, passed_fds: tuple[int, ...] = ()) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", f"testbed.server.{module}", str(theirs.fileno())]
            # A process group of its own: Ctrl-C is the parent's to answer.
            fds = (theirs.fileno(), *passed_fds)
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
            self.process = subprocess.Popen(command, pass_fds=fds, process_group=0, env=environment)
        self.connection = Connection(ours.detach())
        self.name = name

    def tell(self, data: bytes) -> None:
        """Say something; a part that is gone is seen when it is listened to."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(data)

    def hear(self) -> wire.Ready:
        """What the part says. Raises InputError, PartLost, or RuntimeError for a defect, when it cannot go on."""
        try:
            said: wire.FromPart = wire.decode_from_part(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise PartLost(self.name, self._ending()) from None
        if isinstance(said, wire.Refused):
            raise InputError(said.message, where=said.where, remedy=said.remedy)
        if isinstance(said, wire.Failed):
            failure = RuntimeError(f"the {self.name} failed: {said.message}")
            failure.add_note(said.details)
            raise failure
        return said

    def _ending(self) -> str:
        """In words, how it ended."""
        try:
            return ending(self.process.wait(DYING_S))
        except subprocess.TimeoutExpired:
            return "answers no more"

    def end(self) -> None:
        """End it at once: it holds nothing that could be lost."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


class Server:
    """The running parts."""

    def __init__(self, options: ServeOptions, listener: socket.socket, folder: str) -> None:
        self._options, self._listener, self._folder = options, listener, folder
        self._children: list[Child] = []
        self._wakeup, wakeup = socket.socketpair()
        """Readable when a signal came."""
        wakeup.setblocking(False)
        self._signals_to = wakeup

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT are heard by ``_hear`` in this block."""

        def note(number: int, frame: FrameType | None) -> None:
            """The number of the signal is written to the wake-up socket."""

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        wakeup_before = signal.set_wakeup_fd(self._signals_to.fileno())
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self) -> wire.Ready:
        """Start all parts; returns what the scheduler says when requests can come."""
        options, folder = self._options, self._folder
        scheduler, detokenizer = self._child("scheduler", "scheduler"), self._child("detokenizer", "detokenizer")
        workers = [
            self._child("worker", f"HTTP worker {number}", (self._listener.fileno(),))
            for number in range(options.workers)
        ]
        for child in (scheduler, detokenizer):
            child.tell(wire.encode(wire.Start(options, folder)))
        said = self._hear([scheduler, detokenizer])[scheduler]
        for number, child in enumerate(workers):
            child.tell(wire.encode(wire.Start(options, folder, number, self._listener.fileno(), said)))
        self._hear(workers)
        return said

    def _child(self, module: str, name: str, passed_fds: tuple[int, ...] = ()) -> Child:
        child = Child(module, name, passed_fds)
        self._children.append(child)
        return child

    def watch(self) -> None:
        """Returns never: raises Ended at a signal, and what ``Child.hear`` raises when a part ends."""
        self._hear([], for_ever=True)

    def _hear(self, expected: list[Child], *, for_ever: bool = False) -> dict[Child, wire.Ready]:
        """What each of ``expected`` says, as soon as all have. Raises as ``watch``."""
        said: dict[Child, wire.Ready] = {}
        while for_ever or len(said) < len(expected):
            said |= {child: child.hear() for child in self._telling(self._children)}
        return said

    def drain(self) -> None:
        """Turn new requests away, let those that run end, then end the parts. Raises as ``watch``."""
        workers, others = self._children[2:], self._children[:2]
        deadline = time.monotonic() + self._options.waits.drain_s + LATE_S
        self._end_in_order(workers, others, deadline)
        dying_s = SAVING_S if self._options.record else DYING_S
        self._end_in_order(others[:1], others[1:], time.monotonic() + dying_s)

    def _end_in_order(self, first: list[Child], others: list[Child], deadline: float) -> None:
        """Ask ``first`` to end and wait until they have; ``others`` must go on meanwhile."""
        for child in first:
            child.tell(wire.DRAIN)
        left = list(first)
        while left:
            for child in self._telling([*left, *others], max(deadline - time.monotonic(), 0)):
                if child in others or child.process.wait(DYING_S) != 0:
                    child.hear()
                left.remove(child)

    def _telling(self, children: list[Child], timeout_s: float | None = None) -> list[Child]:
        """Wait for those of ``children`` who say something or are gone. Raises Ended at a signal, PartLost when nobody
        does in time."""
        found = wait([self._wakeup, *(child.connection for child in children)], timeout_s)
        if self._wakeup in found:
            time.sleep(TWICE_S)
            raise Ended(self._wakeup.recv(4096)[0])
        if not found:
            raise PartLost(children[0].name, "does not end")
        return [child for child in children if child.connection in found]

    def end(self) -> None:
        """End whatever still runs."""
        for child in self._children:
            child.end()
        self._wakeup.close()
        self._signals_to.close()


def serve(options: ServeOptions, say: Callable[[str], None]) -> int:
    """Run a server until somebody ends it; returns the exit status: 0 when every request had its end, else that of a
    process which ends by the signal. ``say``: told what happens, in lines.

    Raises InputError for what cannot be served and for parts that are lost, RuntimeError for a defect of one.
    """
    with _listener(options) as listener, _folder() as folder:
        server = Server(options, listener, folder)
        try:
            with server.signals():
                say(f"loading {options.names[0]} ...")
                return _run(server, listener, options.record, say)
        finally:
            server.end()


def _run(server: Server, listener: socket.socket, record: str, say: Callable[[str], None]) -> int:
    try:
        said = server.start()
    except Ended:
        return 0
    try:
        for note in said.notes:
            say(f"note: {note}")
        say(f"{said.device}, {said.loop} loop, {said.max_total_num_tokens:,} tokens of KV")
        host, port = listener.getsockname()[:2]
        say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")
        server.watch()
    except Ended as told:
        say(f"{told}: new requests are turned away, running ones may end")
    try:
        server.drain()
    except Ended as told:
        say(f"{told} again: ended at once")
        return 128 + told.number
    if record:
        say(f"recorded in {record}")
    return 0


@contextmanager
def _listener(options: ServeOptions) -> Iterator[socket.socket]:
    """The port, taken but not listened on: nobody is accepted before the model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise InputError(
            f"{options.host} is no address: {error.strerror}", where="--host", remedy="127.0.0.1"
        ) from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise InputError(
                f"port {options.port} of {options.host} cannot be had: {error.strerror}",
                where="--port",
                remedy="name another one, or 0 for any that is free",
            ) from None
        yield listener


@contextmanager
def _folder() -> Iterator[str]:
    """A folder for sockets that nobody else may enter (mode 0700)."""
    folder = tempfile.mkdtemp(prefix="testbed-serve-")
    try:
        if len(os.fsencode(folder)) > LONGEST_FOLDER_BYTES:
            where = f"TMPDIR={tempfile.gettempdir()}"
            raise InputError("the path is too long for sockets", where=where, remedy="name a shorter one")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
