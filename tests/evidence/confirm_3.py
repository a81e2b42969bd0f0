"""On an NVIDIA GPU simulation agrees with life in every scenario: both models, both loops, our host and SGLang's.

One command, within ten minutes: ``python -m tests.fidelity gpu``. Without a GPU the same command runs small models on
the CPU, which measures nothing: then the verdict is that of the committed page.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from testbed.engine.device import has_cuda
from tests.evidence.evidence import Evidence
from tests.fidelity import page

ROOT = Path(__file__).parents[2]


def check(smoke: bool) -> Evidence:
    """With a GPU: measure. Without: see that the command runs to its end."""
    command = [sys.executable, "-m", "tests.fidelity", "gpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    judged = [line for line in ended.stdout.splitlines() if line.startswith("gpu-")]
    worked = "Traceback" not in ended.stderr and len(judged) > 0
    kept = page.summary(page.FOLDER, "gpu")
    if has_cuda():
        figure, passed = kept, ended.returncode == 0  # a page may stay from before when the command fails
    else:
        figure = f"no GPU: nothing was measured; the command {'ran on the CPU' if worked else 'failed'}"
        figure += f"; the committed page: {kept}" if kept else ""
        passed = worked and (smoke or page.holds(page.FOLDER, "gpu"))
    bars = ", ".join(f"{page.NAMES[key]} {bar:g} %" for key, bar in page.BARS["gpu"].items())
    return Evidence(
        figure=figure,
        bar="the command runs"
        if smoke and not has_cuda()
        else f"in every case: {bars}, capacity {page.CAPACITY_BAR} %",
        passed=passed,
        details=tuple(judged or ended.stderr.splitlines()[-5:]),
    )
