"""A device that runs a model, wherever it computes: CUDA in this process, a CPU in a process of its own.

``open_device`` starts one. Both take ``StepInputs`` and give ``StepOutputs``; nobody above sees a tensor.
"""

from __future__ import annotations

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
    try:
        import torch
    except ImportError as error:
        remedy = "pip install 'testbed[engine]' (CPU) or 'testbed[gpu]'"
        raise InputError("a real run needs torch, which is not installed", where="run", remedy=remedy) from error
    cuda = torch.cuda.is_available()
    if in_process is None:
        in_process = cuda
    if not in_process:
        from testbed.engine.process import ProcessDevice

        return ProcessDevice(options)
    from testbed.engine.build import LocalDevice, build_runner

    return LocalDevice(build_runner(options, torch.device("cuda" if cuda else "cpu")))
