"""The worker process: ``python -m testbed.engine.worker FD`` runs a model for the process at the other end of a socket.

It ends with its parent: the socket closes.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection

import torch

from testbed.engine import wire
from testbed.engine.build import build_runner
from testbed.engine.runner import ModelRunner, RunningStep
from testbed.scenario.errors import InputError


def serve(connection: Connection) -> None:
    """Load what the first message names, then compute steps until the parent is gone."""
    start = wire.receive_from_parent(connection)
    assert isinstance(start, wire.Start)
    torch.set_num_threads(start.threads)
    try:
        runner = build_runner(start.options, torch.device("cpu"))
    except InputError as error:
        wire.send(connection, wire.Refused(error.message, str(error.where), str(error.remedy)))
        return
    wire.send(connection, wire.Ready(runner.info))
    # Launches are read as they come, so that the parent never blocks on a full socket while a result is written.
    messages: queue.SimpleQueue[wire.FromParent | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, messages), daemon=True).start()
    step: RunningStep | None = None
    while (message := messages.get()) is not None:
        step = _compute(runner, message, step)
        if step is not None and step.ticket is not None:
            wire.send(connection, wire.Done(step.wait()))


def _compute(runner: ModelRunner, message: wire.FromParent, step: RunningStep | None) -> RunningStep | None:
    if isinstance(message, wire.Launch):
        return runner.launch(message.inputs)
    assert isinstance(message, wire.Sample) and step is not None
    step.sample(message.bitmask)
    return step


def _read(connection: Connection, messages: queue.SimpleQueue[wire.FromParent | None]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            messages.put(wire.receive_from_parent(connection))
    messages.put(None)


def main() -> None:
    """Serve; a defect is told to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    connection = Connection(int(sys.argv[1]))
    try:
        serve(connection)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            wire.send(connection, wire.Failed(f"{type(error).__name__}: {error}"))
        raise


if __name__ == "__main__":
    main()
