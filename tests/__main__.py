"""``python -m tests``: everything that must hold before a change lands: style, types, evidence at smoke size, tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = (
    ["ruff", "check", "."],
    ["mypy", "testbed", "kernels"],
    ["tests.evidence", "all", "--smoke", "--jobs", "2"],
    ["pytest", "-q", "-n", "2", "--dist", "loadfile", "--durations", "10"],
)


def main() -> int:
    """Run the steps in order; stop at the first that fails."""
    # Tests press Ctrl-C. A shell that starts us in the background has it ignored, which all children would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for step in STEPS:
        print(f"+ python -m {' '.join(step)}", flush=True)
        status = subprocess.call([sys.executable, "-m", *step], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "0"})
        if status:
            print(f"failed: {' '.join(step)}", flush=True)
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
