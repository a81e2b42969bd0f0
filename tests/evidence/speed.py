"""One measured run in a process of its own: ``python -m tests.evidence.speed JSON`` prints its figures as JSON.

``cpu_s`` is the process time of ``simulate()`` alone (records kept; report and trace apart), ``rss_bytes`` the peak of
the whole process, ``reference_us`` the time of a fixed loop before and after, by which machines can be compared.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REFERENCE_KEYS = 1000


def reference_us() -> float:
    """The fixed reference loop: add one to each of 1,000 dictionary values; best of 50, in microseconds."""
    counts = dict.fromkeys(range(REFERENCE_KEYS), 0)
    best = float("inf")
    for _ in range(50):
        begin = time.process_time()
        for key in range(REFERENCE_KEYS):
            counts[key] = counts[key] + 1
        best = min(best, time.process_time() - begin)
    return best * 1e6


def measure(scenario: dict[str, Any], leap: bool = True) -> dict[str, float]:
    """Run ``scenario`` here and measure."""
    from testbed import load_scenario, simulate

    loaded = load_scenario(scenario).scenario
    before = reference_us()
    begin = time.process_time()
    run = simulate(loaded, leap=leap)
    cpu_s = time.process_time() - begin
    return {
        "cpu_s": cpu_s,
        "requests": len(run.records.requests["id"]),
        "steps": run.records.counters["steps"],
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "reference_us": min(before, reference_us()),
    }


def in_a_process(scenario: dict[str, Any], leap: bool = True) -> dict[str, float]:
    """``measure`` in a fresh process."""
    command = [sys.executable, "-m", "tests.evidence.speed", json.dumps([scenario, leap])]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(ended.stdout)
    return result


def best_of(times: int, scenario: dict[str, Any], leap: bool = True) -> dict[str, float]:
    """The run with the least CPU time; the largest memory of all. ``leap``: see ``simulate``."""
    runs = [in_a_process(scenario, leap) for _ in range(times)]
    best = min(runs, key=lambda run: run["cpu_s"])
    return best | {"rss_bytes": max(run["rss_bytes"] for run in runs)}


def cpu_name() -> str:
    """The processor's name, as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
