"""Runs of the same scenarios in processes that differ in everything but scenario and seed.

``python -m tests.laws.determinism FOLDER [--no-gc]`` saves a run folder a scenario; ``differences`` starts such
processes and compares what they wrote, byte by byte.
"""

from __future__ import annotations

import argparse
import filecmp
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from testbed import simulate
from tests.laws.exact_laws import SCENARIOS

ROOT = Path(__file__).parents[2]
COMPARED = ("requests", "steps", "spans", "tokens", "decisions")
LENGTHS = {
    "prompt_tokens": {"kind": "uniform", "low": 10, "high": 400},
    "output_tokens": {"kind": "exponential", "mean": 60},
}
RUNS: dict[str, dict[str, Any]] = {
    "radix cache and retraction": SCENARIOS["tiny pool with retraction"],
    "sessions": SCENARIOS["sessions"],
    "SGLang's rules": SCENARIOS["SGLang's rules"],
    "random policy": {
        "model": "qwen3-0.6b",
        "engine": {"policy": "random", "max_running_requests": 8, "loop": "normal"},
        "workload": {"arrivals": {"kind": "poisson", "rate_per_s": 80}, "lengths": LENGTHS, "count": 100},
    },
    "closed loop": {
        "model": "llama-3.1-8b",
        "host": "vllm-v1",
        "engine": {"batching": "stall_free", "chunked_prefill_size": 256},
        "workload": {
            "arrivals": {"kind": "closed_loop", "users": 16, "think_s": {"kind": "exponential", "mean": 0.2}},
            "lengths": LENGTHS,
            "count": 100,
        },
    },
    "tied to iterations": {
        "model": "qwen3-0.6b",
        "engine": {"policy": "dfs_weight", "kv_tokens": 4000},
        "workload": {
            "arrivals": {"kind": "at_iteration", "every": 5, "batch": 3},
            "prefix": {"groups": 4, "prefix_tokens": 60},
            "lengths": LENGTHS,
            "count": 90,
        },
    },
}


class Variant(NamedTuple):
    """A process: its hash seed, whether it collects garbage, whether it works in another folder."""

    name: str
    hash_seed: str
    collects: bool = True
    elsewhere: bool = False


VARIANTS = (
    Variant("first", "0"),
    Variant("a second process", "0"),
    Variant("another hash seed", "4242"),
    Variant("no garbage collection, random hash seed", "random", collects=False),
    Variant("another working directory", "7", elsewhere=True),
)


def differences(folder: Path, variants: tuple[Variant, ...] = VARIANTS) -> tuple[list[str], int]:
    """What differs from the first variant, in words, and how many files were compared."""
    folders = [folder / str(number) for number in range(len(variants))]
    for variant, target in zip(variants, folders, strict=True):
        _start(variant, target, folder)
    first, *others = folders
    written = [file.relative_to(first) for file in sorted(first.rglob("*")) if file.suffix != ".sha256"]
    files = [file for file in written if file.stem in COMPARED]
    found = [
        f"{variant.name}: {file}"
        for variant, other in zip(variants[1:], others, strict=True)
        for file in files
        if not filecmp.cmp(first / file, other / file, shallow=False)
    ]
    return found, len(files) * len(others)


def _start(variant: Variant, target: Path, scratch: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": variant.hash_seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.laws.determinism", str(target), *([] if variant.collects else ["--no-gc"])]
    subprocess.run(command, cwd=scratch if variant.elsewhere else ROOT, env=environment, check=True, timeout=300)


def main() -> None:
    """Run and save every scenario."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-gc", action="store_true")
    arguments = parser.parse_args()
    if arguments.no_gc:
        gc.disable()
    arguments.folder.mkdir(parents=True)
    for number, (name, scenario) in enumerate(RUNS.items()):
        simulate({"name": name, "seed": number, **scenario}).save(arguments.folder / str(number))


if __name__ == "__main__":
    main()
