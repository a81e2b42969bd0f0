"""Every Triton kernel equals its reference in the interpreter, over random shapes, page layouts and dtypes.

Runs ``tests/kernels``, where hypothesis draws shapes; every file of ``kernels/`` that has a kernel must have its tests
there. At full size also the compilation of every kernel for a Hopper GPU.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from tests.evidence.evidence import Evidence

ROOT = Path(__file__).parents[2]


def check(smoke: bool) -> Evidence:
    """Run the tests of the kernels in a process of their own, in the interpreter."""
    kernels = {file.stem: count for file in (ROOT / "kernels").glob("*.py") if (count := compiled_functions(file))}
    passed, wrong = run_tests(with_compilation=not smoke)
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


def run_tests(with_compilation: bool) -> tuple[Counter[str], list[str]]:
    """Tests that passed, by file, and the names of those that did not."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", f"--junitxml={report}"]
        if not with_compilation:
            command.append("--ignore=tests/kernels/test_ahead_of_time.py")
        subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, check=False)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    passed: Counter[str] = Counter()
    wrong = [] if cases else ["the tests did not run"]
    for case in cases:
        if len(case.findall("failure")) + len(case.findall("error")) + len(case.findall("skipped")):
            wrong.append(f"{case.get('classname')}.{case.get('name')}")
        else:
            passed[str(case.get("classname")).rpartition(".")[2]] += 1
    return passed, wrong
