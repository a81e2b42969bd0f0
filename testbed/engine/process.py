"""The engine in a process of its own: on a CPU, torch in the loop's process would compete with the loop for the
interpreter, and what is measured would be the contention."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from testbed.engine import wire
from testbed.engine.device import DeviceLost
from testbed.engine.inputs import StepInputs, StepOutputs
from testbed.engine.options import EngineOptions
from testbed.scenario.errors import InputError

DYING_S = 5.0
"""How long a worker may take to end once its socket is closed."""


class ProcessDevice:
    """A worker process that computes on the CPU. Raises InputError if it cannot start."""

    def __init__(self, options: EngineOptions) -> None:
        """Computes with all cores but one: that one is the calling thread's, which stays there until the device is
        closed. A worker woken on the loop's core would stop it for milliseconds (seen in 5 to 10 % of launches)."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "testbed.engine.worker", str(theirs.fileno())]
            # A process group of its own: Ctrl-C is the parent's to answer.
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0)
        self._connection = Connection(ours.detach())
        self._launches = 0
        self._cores = os.sched_getaffinity(0)
        try:
            self._share_cores()
            self._send(wire.Start(options, max(1, len(self._cores) - 1)))
            answer = self._receive()
        except BaseException:
            self.close()
            raise
        assert isinstance(answer, wire.Ready)
        self.info = answer.info

    def _share_cores(self) -> None:
        """The first core for this thread, the others for the worker."""
        mine = min(self._cores)
        if len(self._cores) > 1:
            os.sched_setaffinity(self._process.pid, self._cores - {mine})
            os.sched_setaffinity(0, {mine})

    def launch(self, inputs: StepInputs) -> _Launched:
        """See device.Device."""
        self._launches += 1
        self._send(wire.Launch(self._launches, inputs))
        return _Launched(self, self._launches)

    def sample(self, bitmask: NDArray[np.int32] | None) -> None:
        """Second phase of the last launch."""
        self._send(wire.Sample(bitmask))

    def result(self, launch: int) -> StepOutputs:
        """The outputs of a launch; those of launches before it that nobody asked for (a run was interrupted) are
        passed over."""
        while True:
            answer = self._receive()
            assert isinstance(answer, wire.Done) and answer.launch <= launch, "results come in launch order"
            if answer.launch == launch:
                return answer.outputs

    def _send(self, message: wire.FromParent) -> None:
        try:
            wire.send(self._connection, message)
        except OSError:
            while True:  # behind the results that are still to be read it may have said why it ended
                self._receive()

    def _receive(self) -> wire.FromWorker:
        try:
            answer = wire.receive_from_worker(self._connection)
        except (EOFError, OSError) as error:
            raise self._lost() from error
        if isinstance(answer, wire.Refused):
            raise InputError(answer.message, where=answer.where, remedy=answer.remedy)
        if isinstance(answer, wire.Failed):
            failure = RuntimeError(f"the worker process failed: {answer.message}")
            failure.add_note(answer.details)
            raise failure
        return answer

    def _lost(self) -> DeviceLost:
        try:
            return DeviceLost(f"its process (a CPU worker) {ending(self._process.wait(DYING_S))}")
        except subprocess.TimeoutExpired:
            return DeviceLost("its process (a CPU worker) answers no more")

    def check(self) -> None:
        """See device.Device."""
        if self._process.poll() is not None:
            raise self._lost()

    def close(self) -> None:
        """End the worker, whatever it does: it holds nothing that could be lost. A second call has no effect."""
        if not self._connection.closed:
            os.sched_setaffinity(0, self._cores)
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ending(status: int) -> str:
    """In words, how a process with this return code ended."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


class _Launched:
    __slots__ = ("_device", "_number")

    def __init__(self, device: ProcessDevice, number: int) -> None:
        self._device = device
        self._number = number

    def sample(self, bitmask: NDArray[np.int32] | None) -> None:
        self._device.sample(bitmask)

    def wait(self) -> StepOutputs:
        return self._device.result(self._number)
