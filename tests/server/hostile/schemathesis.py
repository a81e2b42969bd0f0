"""Schemathesis over all that the OpenAPI page says, with every check it has and two of our own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.server.serving import Serving

CONFIG = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]
# 413: a body that breaks another rule too may be refused for its size, before anybody reads it.
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 413, 415]
# 400: rules between two fields (best_of and n, text or input_ids) are in no schema; 413: nor is the size of a body.
positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 413, 503]
"""
PATIENCE_S = 3600


@dataclass(frozen=True)
class Examination:
    """What it found."""

    passed: bool
    output: str
    selected: int
    operations: int
    """That were tested."""
    cases: int


def examine(server: Serving, folder: Path, *, examples: int, key: str, seed: int = 1) -> Examination:
    """Run all of its phases: ``examples`` cases of random data for every operation, beside those that the bounds of the
    schema alone lead to."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG, encoding="utf-8")
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    options = ["--mode=all", "--checks=all", f"--max-examples={examples}", f"--seed={seed}", "--continue-on-failure"]
    output = ["--no-color", "--generation-database=none", f"--header=Authorization: Bearer {key}"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.server.hostile.checks"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    ended = subprocess.run(
        [*command, f"{server.url}/openapi.json", *options, *output],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=PATIENCE_S,
        check=False,
    )
    counts = (r"Selected: +(\d+)/\d+", r"Tested: +(\d+)", r"([\d,]+) generated")
    said = [re.search(pattern, ended.stdout) for pattern in counts]
    numbers = [int(found[1].replace(",", "")) if found else 0 for found in said]
    return Examination(ended.returncode == 0, ended.stdout + ended.stderr, *numbers)
