"""``python -m tests.evidence ISSUE.LINE [--smoke]``: print the figure, the bar and PASS or FAIL; exit with 0 or 1.

A line is a module ``ISSUE_LINE.py`` in this folder with ``check(smoke: bool) -> Evidence``; its docstring says what is
shown. ``all`` in place of a line runs every line there is, with ``--jobs N`` in N processes at a time.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

from tests.evidence.evidence import Evidence

FOLDER = Path(__file__).parent
LINE = re.compile(r"[a-z]+_\d+")


def lines() -> list[str]:
    """The lines that exist, as ``issue.number``, in order."""
    names = [file.stem for file in FOLDER.glob("*.py") if LINE.fullmatch(file.stem)]
    split = [(name.rpartition("_")[0], int(name.rpartition("_")[2])) for name in names]
    return [f"{issue}.{number}" for issue, number in sorted(split)]


def show(line: str, smoke: bool) -> bool:
    """Run one line and print it."""
    module = importlib.import_module(f"tests.evidence.{line.replace('.', '_')}")
    found: Evidence = module.check(smoke)
    print(f"{line}: {(module.__doc__ or '').strip().splitlines()[0]}")
    print(f"  figure: {found.figure}\n  bar:    {found.bar}")
    for detail in found.details:
        print(f"  {detail}")
    print(f"  {'PASS' if found.passed else 'FAIL'}{' (smoke size)' if smoke else ''}", flush=True)
    return found.passed


def show_in_a_process(line: str, smoke: bool) -> bool:
    """As ``show``, printed when it has ended, with what it took."""
    begin = monotonic()
    command = [sys.executable, "-m", "tests.evidence", line, *(["--smoke"] if smoke else [])]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(f"{ended.stdout}  in {monotonic() - begin:.0f} s", flush=True)
    return ended.returncode == 0


def main() -> int:
    """Parse the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.evidence", description="Show one line of evidence.")
    parser.add_argument("line", choices=[*lines(), "all"], metavar="ISSUE.LINE", help=f"{', '.join(lines())}, or all")
    parser.add_argument("--smoke", action="store_true", help="a small size, for continuous integration")
    parser.add_argument("--jobs", type=int, default=1, help="of all: lines at a time (1); more disturb clocks")
    arguments = parser.parse_args()
    if arguments.line != "all":
        return 0 if show(arguments.line, arguments.smoke) else 1
    with ThreadPoolExecutor(arguments.jobs) as pool:
        passed = list(pool.map(lambda line: show_in_a_process(line, arguments.smoke), lines()))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
