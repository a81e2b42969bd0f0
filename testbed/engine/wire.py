"""What a worker process and its parent say to one another: msgpack, never pickle."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from testbed.engine.inputs import StepInputs, StepOutputs
from testbed.engine.options import DeviceInfo, EngineOptions


class Start(msgspec.Struct, tag=True):
    """Parent: load this and answer with Ready or Refused."""

    options: EngineOptions
    threads: int


class Launch(msgspec.Struct, tag=True):
    """Parent: compute this step; without ``defer_sampling`` the answer is Done."""

    number: int
    """The worker's launches are counted over all runs; steps are counted by each run."""
    inputs: StepInputs


class Sample(msgspec.Struct, tag=True):
    """Parent: draw the tokens of the last step; the answer is Done."""

    bitmask: NDArray[np.int32] | None = None


class Ready(msgspec.Struct, tag=True):
    """Worker: loaded."""

    info: DeviceInfo


class Refused(msgspec.Struct, tag=True):
    """Worker: an InputError; it ends."""

    message: str
    where: str
    remedy: str


class Done(msgspec.Struct, tag=True):
    """Worker: a step's results, in launch order."""

    launch: int
    outputs: StepOutputs


class Failed(msgspec.Struct, tag=True):
    """Worker: a defect; it ends."""

    message: str
    details: str
    """The traceback."""


FromParent = Start | Launch | Sample
FromWorker = Ready | Refused | Done | Failed


def _from_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    raise NotImplementedError(f"{type(value)} does not travel")


def _to_array(kind: Any, value: Any) -> Any:
    dtype = get_args(get_args(kind)[1])[0]
    shape, data = value
    return np.frombuffer(bytearray(data), dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_from_array)
_from_parent = msgspec.msgpack.Decoder(FromParent, dec_hook=_to_array)
_from_worker = msgspec.msgpack.Decoder(FromWorker, dec_hook=_to_array)


def send(connection: Connection, message: FromParent | FromWorker) -> None:
    """Raises OSError when the other side is gone."""
    connection.send_bytes(_encoder.encode(message))


def from_parent(data: bytes) -> FromParent:
    """What the parent sent."""
    return _from_parent.decode(data)


def receive_from_worker(connection: Connection) -> FromWorker:
    """Raises EOFError or OSError when the worker is gone."""
    return _from_worker.decode(connection.recv_bytes())
