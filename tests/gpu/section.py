"""``python -m tests.gpu.section FILE SECTION...``: measure in this process; results go to FILE, a JSON object a line.

Each row is written when it is known, so that what was measured stays where a later row fails, hangs or kills the
process. Lines: ``{"machine": {...}}`` first, then ``{"section": name}``, ``{"row": {...}}`` for each of its rows, and
``{"seconds": s, "error": text or null}``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import traceback
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

import torch
from transformers.utils import logging

from tests.gpu.report import NOT_OF_SPEED
from tests.gpu.setting import Row


def machine(device: torch.device) -> dict[str, str]:
    """What figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if device.type != "cuda":
        return {"device": "no GPU", **found}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {"device": torch.cuda.get_device_name(device), "driver": driver, "cuda": str(torch.version.cuda), **found}


def measure(name: str, device: torch.device, lines: TextIO) -> None:
    """One section; an error is part of the result."""
    _write(lines, {"section": name})
    begin, error = perf_counter(), None
    try:
        for row in importlib.import_module(f"tests.gpu.{name}").measure(device):
            told = row if device.type == "cuda" else without_speed(row, name)
            _write(lines, {"row": asdict(told)})
            print(f"{name}: {told.what}: {told.figure}", flush=True)
    except Exception as caught:
        traceback.print_exc()
        error = f"{type(caught).__name__}: {caught}"
    _write(lines, {"seconds": perf_counter() - begin, "error": error})


def without_speed(row: Row, name: str) -> Row:
    """A row of a CPU: how fast a tiny size ran there says nothing."""
    return row if name in NOT_OF_SPEED else Row(row.what, "ran")


def _write(lines: TextIO, value: dict[str, Any]) -> None:
    lines.write(json.dumps(value) + "\n")
    lines.flush()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.section", description="Measure sections of the report.")
    parser.add_argument("file", type=Path)
    parser.add_argument("section", nargs="+")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    logging.disable_progress_bar()
    with arguments.file.open("w", encoding="utf-8") as lines:
        _write(lines, {"machine": machine(device)})
        for name in arguments.section:
            measure(name, device, lines)


if __name__ == "__main__":
    sys.exit(main())
