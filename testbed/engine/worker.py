"""The worker process: ``python -m testbed.engine.worker FD`` runs a model for the process at the other end of a socket.

It ends with its parent, whatever it is doing: the socket closes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from testbed.engine import wire
from testbed.engine.device import needs_installing
from testbed.scenario.errors import InputError

if TYPE_CHECKING:
    from testbed.engine.build import LocalDevice
    from testbed.engine.runner import RunningStep

Messages = queue.SimpleQueue[bytes]


def serve(connection: Connection) -> None:
    """Load what the first message names, then compute steps for ever. Raises InputError for what cannot run."""
    # Messages are read as they come: the parent never blocks on a full socket while a result is written, and its end is
    # seen while a model is loaded.
    messages: Messages = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, messages), daemon=True).start()
    start = wire.from_parent(messages.get())
    assert isinstance(start, wire.Start)
    device = _open(start)
    wire.send(connection, wire.Ready(device.info))
    step: RunningStep | None = None
    number = 0
    while True:
        message = wire.from_parent(messages.get())
        if isinstance(message, wire.Launch):
            number, step = message.number, device.launch(message.inputs)
            if message.inputs.defer_sampling:
                continue
        else:
            assert isinstance(message, wire.Sample) and step is not None
            step.sample(message.bitmask)
        wire.send(connection, wire.Done(number, step.wait()))


def _open(start: wire.Start) -> LocalDevice:
    with needs_installing():
        import torch

        from testbed.engine.build import LocalDevice, build_runner
    torch.set_num_threads(start.threads)
    return LocalDevice(build_runner(start.options, torch.device("cpu")))


def _read(connection: Connection, messages: Messages) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            messages.put(connection.recv_bytes())
    os._exit(0)


def main() -> None:
    """Serve; what went wrong is told to the parent."""
    connection = Connection(int(sys.argv[1]))
    try:
        serve(connection)
    except InputError as error:
        answer: wire.FromWorker = wire.Refused(error.message, error.where, error.remedy)
    except Exception as error:
        answer = wire.Failed(f"{type(error).__name__}: {error}", traceback.format_exc())
    with contextlib.suppress(OSError):
        wire.send(connection, answer)


if __name__ == "__main__":
    main()
