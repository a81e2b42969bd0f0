"""What a device lacks or fails at, in words for the one who chose the scenario."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from testbed.engine.device import DeviceLost
from testbed.scenario.errors import InputError

MEMINFO = Path("/proc/meminfo")


def free_bytes() -> int:
    """Memory of this machine that can be taken without swapping; all there is, where the system does not tell."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for name, _, value in (line.partition(":") for line in lines):
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. On a CPU, torch says it in words only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def device_errors() -> Iterator[None]:
    """Too little memory is the scenario's fault, and a device that fails is lost: both become an InputError. Anything
    else is a defect, and stays what it is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise _out_of_memory(error) from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceLost(str(error).splitlines()[0]) from error
        raise


def _out_of_memory(error: BaseException) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else "an allocation failed"
    return InputError(
        f"out of device memory: {reason}",
        where="engine.kv_tokens",
        remedy="lower it (or engine.mem_fraction_static, engine.chunked_prefill_size), or choose a smaller model",
    )
