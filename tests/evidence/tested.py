"""Tests as evidence: which of them passed, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]


def run_tests(*arguments: str, environment: Mapping[str, str] = MappingProxyType({})) -> tuple[list[str], list[str]]:
    """Names of the tests that passed (``file::test[case]``), and of those that failed or were skipped. ``arguments``:
    pytest's. When nothing ran, that is what is wrong."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *arguments, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, check=False)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    passed, wrong = [], [] if cases else ["the tests did not run"]
    for case in cases:
        name = f"{str(case.get('classname')).rpartition('.')[2]}::{case.get('name')}"
        broken = case.findall("failure") + case.findall("error") + case.findall("skipped")
        (wrong if broken else passed).append(name)
    return passed, wrong


def missing(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Which of ``wanted`` no name contains."""
    return [each for each in wanted if not any(each in name for name in names)]
