"""The kernel tests on the device, plainly and under compute-sanitizer, torch's memory caching off.

With the caching allocator a kernel that writes beyond a tensor hits memory that belongs to torch, and nobody notices:
off, every tensor is an allocation of its own. ``memcheck`` finds accesses outside of them, ``racecheck`` hazards in
shared memory. Tests run file by file, so that a page made in too little time says which were clean.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from time import perf_counter

import torch

from tests.gpu.setting import Row, is_gpu

ROOT = Path(__file__).parents[2]
NEEDS_NO_GPU = {"test_ahead_of_time"}
TOOLS = ("memcheck", "racecheck")
FOUND = 86
"""Exit status that tells errors of the sanitizer from failed tests."""


def measure(device: torch.device) -> Iterator[Row]:
    """One row a tool and file of tests; without a GPU, the quickest file in Triton's interpreter."""
    if not is_gpu(device):
        yield _tests(None, ROOT / "tests" / "kernels" / "test_silu_mul.py", interpret=True)
        return
    if which("compute-sanitizer") is None:
        raise RuntimeError("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit")
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    for tool in (None, *TOOLS):
        for file in files:
            if file.stem not in NEEDS_NO_GPU:
                yield _tests(tool, file, interpret=False)


def command_of(tool: str | None, file: Path) -> list[str]:
    """Python's tests of one file, under ``tool`` or plainly."""
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    if tool is None:
        return tests
    # Libraries probe the driver with calls that are meant to fail: only what kernels do is judged.
    return ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND), *tests]


def _tests(tool: str | None, file: Path, *, interpret: bool) -> Row:
    caching = {} if tool is None else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment = {**os.environ, **caching, "TRITON_INTERPRET": "1" if interpret else "0"}
    begin = perf_counter()
    done = subprocess.run(
        command_of(tool, file), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    seconds = perf_counter() - begin
    clean = done.returncode == 0
    said = [line for line in done.stdout.splitlines() if line.strip()]
    figure = f"{'clean' if clean else f'exit status {done.returncode}'}, {seconds:.0f} s"
    if not clean:
        print("\n".join(said[-60:]), flush=True)
        errors = [line for line in said if "ERROR SUMMARY" in line or line.startswith(("FAILED", "E  "))]
        figure += f": {' | '.join((errors or said)[-3:])}"
    return Row(f"{tool or 'tests'}: {file.stem}", figure, "clean", clean, {"seconds": seconds})
