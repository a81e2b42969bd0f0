"""A device that runs a model, wherever it computes: CUDA in this process, a CPU in a process of its own.

``open_device`` starts one. Both take ``StepInputs`` and give ``StepOutputs``; nobody above sees a tensor.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from testbed.engine.inputs import StepInputs, StepOutputs
from testbed.engine.options import DeviceInfo, EngineOptions
from testbed.scenario.errors import InputError


class DeviceLost(InputError):
    """The device stopped answering in the middle of a run."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"the device is lost: {message}",
            where="run",
            remedy="start the run again; if it was killed for memory, lower engine.kv_tokens or the model's size",
        )


class Launched(Protocol):
    """A step on its way."""

    def sample(self, bitmask: NDArray[np.int32] | None) -> None:
        """Draw the tokens of a step that was launched with ``defer_sampling``. ``bitmask``: int32 [rows, words]."""
        ...

    def wait(self) -> StepOutputs:
        """Block until it is computed. Raises DeviceLost."""
        ...


class Device(Protocol):
    """Computes steps in the order of their launches."""

    info: DeviceInfo

    def launch(self, inputs: StepInputs) -> Launched:
        """Returns before the step is computed. Raises DeviceLost."""
        ...

    def check(self) -> None:
        """Raises DeviceLost where the device is seen to be gone without asking it for anything."""
        ...

    def close(self) -> None:
        """Give back what it holds; a second call has no effect."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_device(options: EngineOptions, *, in_process: bool | None = None) -> Device:
    """Load the model and start the device: CUDA where there is one, else the CPU.

    ``in_process``: None: CUDA is, a CPU is not, because torch would compete with the loop for the interpreter.
    Raises InputError for a model that cannot be run, a broken checkpoint, too little memory, or a missing torch.
    """
    cuda = has_cuda()
    if in_process is None:
        in_process = cuda
    if not in_process:
        with needs_installing():
            from testbed.engine.process import ProcessDevice
        return ProcessDevice(options)
    with needs_installing():
        import torch

        from testbed.engine.build import LocalDevice, build_runner
    return LocalDevice(build_runner(options, torch.device("cuda" if cuda else "cpu")))


def has_cuda() -> bool:
    """Whether this machine's device is CUDA. Raises InputError for a missing torch."""
    with needs_installing():
        import torch
    return torch.cuda.is_available()


@contextmanager
def needs_installing() -> Iterator[None]:
    """An import that fails in this block is an InputError: what the engine stands on is optional."""
    try:
        yield
    except (ImportError, OSError) as error:
        reason = f"cannot be loaded: {error}"
        if isinstance(error, ModuleNotFoundError):
            reason = f"is incomplete: {error.name} is not installed"
        remedy = "pip install 'testbed[engine]' (CPU) or 'testbed[gpu]'"
        raise InputError(f"the engine {reason}", where="run", remedy=remedy) from error


def processor_name() -> str:
    """The name of this machine's CPU, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
