"""Run folders as somebody hands them on: altered, with digests made anew or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from testbed.metrics import files


def reseal(folder: Path) -> Path:
    """Make every digest anew, as a forger would."""
    path = folder / "run.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["files"] = {name: sha256((folder / name).read_bytes()).hexdigest() for name in content["files"]}
    path.write_text(json.dumps(content), encoding="utf-8")
    files.seal(folder)
    return folder


def edit_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change ``run.json`` and seal it."""
    path = folder / "run.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    files.seal(folder)
    return folder


def flip(path: Path, place: int, bits: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(bytes(data))
