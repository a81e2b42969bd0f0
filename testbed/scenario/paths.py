"""Where data lies that the project does not ship."""

from __future__ import annotations

import os
from pathlib import Path


def data_root() -> Path | None:
    """The folder that ``TESTBED_DATA`` names, else ``shared/data`` beside the repository, else None."""
    if named := os.environ.get("TESTBED_DATA"):
        return Path(named).expanduser()
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return beside if beside.is_dir() else None


def trace_folder() -> Path:
    """Where fetched traces are kept and looked for: the folder that ``TESTBED_DATA`` names, else ``data/traces``."""
    named = os.environ.get("TESTBED_DATA")
    return Path(named).expanduser() if named else Path("data", "traces")
