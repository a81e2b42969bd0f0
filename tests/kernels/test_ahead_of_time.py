"""Every kernel compiles for an H100, without one: no spilled registers, and its shared memory fits.

The convention: a module of ``kernels/`` that holds Triton kernels has a function

    def ahead_of_time() -> AheadOfTime:  # testbed.kernels.measure.AheadOfTime
        yield kernel, {"x": "*bf16:16", "tokens": "i32", "stride": "i32:16"}, {"BLOCK": 1024}, {"num_warps": 4}

It yields, for every variant worth a check (the real head sizes, widths, dtypes), the ``@triton.jit`` function; the
types of its arguments by name; the values of its ``tl.constexpr`` arguments by name; and the options of the launch
(``num_warps``, ``num_stages``). Types are written as Triton's own compile tool writes them: ``*bf16`` is a pointer,
``i32`` a number, and ``:16`` behind it says that it is a multiple of 16, as the launcher finds out by itself at run
time (pointers of torch tensors are; strides usually).

This file is also the program that does the compiling, in a process of its own, since the tests' process interprets.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
MODULES = sorted(file.stem for file in KERNELS.glob("*.py") if "def ahead_of_time" in file.read_text(encoding="utf-8"))
SHARED_BYTES = 227 * 1024
"""What a block of an H100 can have (CUDA C++ Programming Guide, compute capability 9.0)."""


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict[str, Any]]]:
    """What became of each module's variants. One process for all: what takes long is to load torch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, *MODULES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    return {module: [report for report in reports if report["module"] == module] for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_compiles_for_hopper(module: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    assert compiled[module], f"{module}.ahead_of_time() yields nothing"
    for report in compiled[module]:
        assert report["stack"] == report["local"] == 0, f"spills: {report}"
        assert 0 < report["registers"] <= 255 and report["shared"] <= SHARED_BYTES, report


def compile_for_hopper(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, int]
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    named = {**signature, **dict.fromkeys(constants, "constexpr")}
    types = {name: named[name].partition(":")[0] for name in kernel.arg_names}
    multiples = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(types) if named[name].endswith(":16")}
    source = ASTSource(kernel, types, constexprs=constants, attrs=multiples)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers and bytes of stack and local memory of one thread, as cuobjdump reads them off the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text.stdout)
    assert used, text.stdout
    return {"registers": int(used[1]), "stack": int(used[2]), "local": int(used[3])}


def main(modules: list[str]) -> None:
    for module in modules:
        for kernel, signature, constants, options in importlib.import_module(
            f"testbed.kernels.{module}"
        ).ahead_of_time():
            compiled = compile_for_hopper(kernel, signature, constants, options)
            report = {"module": module, "kernel": kernel.__name__, "shared": compiled.metadata.shared}
            named = {name: str(value) for name, value in constants.items()}
            print(json.dumps({**report, **resources(compiled), "constants": named, **options}))


if __name__ == "__main__":
    main(sys.argv[1:])
