"""A part of the server is a process of its own: what all of them do towards their parent.

It is started as ``python -m testbed.server.PART FD``, with a socket to the parent. Over it the part is told what to be
(``wire.Start``), says that it is ready or why it cannot go on, and is asked to end (``wire.DRAIN``). When the socket
closes, the parent is gone: the part ends at once, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from testbed.scenario.errors import InputError
from testbed.server import wire
from testbed.server.logs import set_up_logging


class Part:
    """This process, as its parent sees it."""

    def __init__(self, connection: Connection, start: wire.Start) -> None:
        self._connection = connection
        self.start = start

    def tell(self, what: wire.FromPart) -> None:
        """Say something to the parent, if it is still there."""
        with contextlib.suppress(OSError):
            self._connection.send_bytes(wire.encode(what))

    def watch(self, drain: Callable[[], None]) -> None:
        """From now on call ``drain``, in a thread of its own, when the parent asks; and end when it is gone."""
        threading.Thread(target=self._watch, args=(drain,), daemon=True).start()

    def _watch(self, drain: Callable[[], None]) -> None:
        with contextlib.suppress(EOFError, OSError):
            while self._connection.recv_bytes() == wire.DRAIN:
                drain()
        shutil.rmtree(self.start.folder, ignore_errors=True)  # the parent had no time to
        os._exit(1)


def run_part(serve: Callable[[Part], None]) -> None:
    """The main function of a part: ``serve`` runs until it has ended; what went wrong is told to the parent."""
    # A group of processes is often told to end as a whole; but the order in which the parts end is the parent's.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_up_logging()
    connection = Connection(int(sys.argv[1]))
    try:
        part = Part(connection, wire.decode_start(connection.recv_bytes()))
    except EOFError:
        return
    try:
        serve(part)
    except InputError as error:
        part.tell(wire.Refused(error.message, error.where, error.remedy))
    except Exception as error:
        part.tell(wire.Failed(f"{type(error).__name__}: {error}", traceback.format_exc()))
    else:
        return
    raise SystemExit(1)
