"""How a case is laid out in a folder, and what is wrong with a command's answer to it."""

from __future__ import annotations

from pathlib import Path

from testbed.cli.main import WRONG_INPUT
from tests.bad_input.cases import Case


def lay_out(case: Case, folder: Path) -> None:
    """Write the files of the case."""
    for name, content in case.files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


def objections(case: Case, status: int, stdout: str, stderr: str) -> list[str]:
    """Everything that the answer lacks; empty when it is as it should be."""
    found = [] if status == WRONG_INPUT else [f"status {status}, not {WRONG_INPUT}"]
    wanted = (f"error: {case.place}", *case.says, *case.remedy)
    found += [f"the message lacks {words!r}" for words in wanted if words not in stderr]
    if "Traceback" in stdout + stderr:
        found.append("a traceback")
    if not any(line.startswith("  ") for line in stderr.splitlines()):
        found.append("no remedy on a line of its own")
    return [f"{objection}; stderr: {stderr}" for objection in found]
