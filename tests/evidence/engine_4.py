"""Every Triton kernel equals its reference in the interpreter, over random shapes, page layouts and dtypes.

Runs ``tests/kernels``, where hypothesis draws shapes; every file of ``kernels/`` that has a kernel must have its tests
there. At full size also the compilation of every kernel for a Hopper GPU.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from tests.evidence.evidence import Evidence
from tests.evidence.tested import ROOT, run_tests


def check(smoke: bool) -> Evidence:
    """Run the tests of the kernels in a process of their own, in the interpreter."""
    kernels = {file.stem: count for file in (ROOT / "kernels").glob("*.py") if (count := compiled_functions(file))}
    left_out = ["--ignore=tests/kernels/test_ahead_of_time.py"] if smoke else []
    names, wrong = run_tests("tests/kernels", *left_out, environment={"TRITON_INTERPRET": "1"})
    passed = Counter(name.partition("::")[0] for name in names)
    untested = [name for name in kernels if not passed[f"test_{name}"]]
    problems = [*(f"no test passed: kernels/{name}.py" for name in untested), *wrong]
    return Evidence(
        figure=f"{passed.total()} tests of {len(kernels)} files with {sum(kernels.values())} functions for the device; "
        f"{len(wrong)} failed or skipped, {len(untested)} files untested",
        bar="every file tested, no failure, no skip",
        passed=not problems,
        details=(*problems, *(f"{name}: {count} passed" for name, count in sorted(passed.items()))),
    )


def compiled_functions(file: Path) -> int:
    """Functions that Triton compiles."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return sum(any("triton.jit" in ast.unparse(mark) for mark in one.decorator_list) for one in functions)
