"""From an empty clone the README's first command ends with the comparison of both loops and names the report."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from tests.evidence.evidence import Evidence

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 180


def first_command() -> str:
    """The first command that the README shows."""
    found = re.search(r"```bash\n(.+?)\n```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found.group(1)


def check(smoke: bool) -> Evidence:
    """Clone the last commit into an empty folder and run the command there, with nothing of this environment."""
    command = first_command()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "testbed"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        ours = ("VIRTUAL_ENV", "PYTHON")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        begin = time.monotonic()
        ended = subprocess.run(
            ["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        wall_s = time.monotonic() - begin
        report = re.search(r"^report: (\S+\.html)$", ended.stdout, re.MULTILINE)
        page = clone / report.group(1) if report else None
        size = page.stat().st_size if page is not None and page.is_file() else 0
    compared = all(name in ended.stdout for name in ("normal", "overlap", "mean_ttft_ms", "request_throughput"))
    passed = ended.returncode == 0 and compared and size > 50_000 and wall_s < LIMIT_S
    details = [f"command: {command}", f"report: {report.group(1) if report else 'not named'} ({size:,} bytes)"]
    if not passed:
        details += ["output ends with:", *(ended.stdout + ended.stderr).splitlines()[-15:]]
    return Evidence(
        figure=f"{wall_s:.0f} s with set-up, exit status {ended.returncode}, both loops compared: {compared}",
        bar=f"under {LIMIT_S} s, status 0, the comparison, and where the report lies",
        passed=passed,
        details=tuple(details),
    )
