"""``python -m tests.gpu.wheels FOLDER``: gather the wheels that an offline GPU machine lacks.

Such a machine has torch, triton, transformers, numpy and the like; it lacks what the simulator and the records need.
There: ``python -m pip install --no-index --no-deps --target site FOLDER/*.whl`` and put ``site`` on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

WHEELS = (
    *("simpy", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "ruamel.yaml", "msgspec"),
    *("typer", "rich", "perfetto", "protobuf", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "execnet"),
)
"""With the versions installed here, whatever the other machine may have of them."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


def gather(folder: Path, python: str) -> int:
    """Download them for ``python`` (such as 3.12) on x86-64 Linux; returns pip's exit status."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    return subprocess.call([*command, *(f"{name}=={version(name)}" for name in WHEELS)])


def main() -> int:
    """Parse the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.wheels", description="Gather wheels for a GPU machine.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the Python there (3.12)")
    arguments = parser.parse_args()
    return gather(arguments.folder, arguments.python)


if __name__ == "__main__":
    sys.exit(main())
