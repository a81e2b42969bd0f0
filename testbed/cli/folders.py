"""Where a run is written: always a folder of its own, never over another run."""

from __future__ import annotations

import re
from pathlib import Path

from testbed.scenario.errors import InputError


def output_folder(chosen: Path | None, name: str, parent: Path = Path("runs")) -> Path:
    """Make the folder: ``chosen``, which must be new or empty, or ``runs/NAME-NUMBER`` with the next free number.

    Raises InputError when it cannot be made or holds something.
    """
    check_output(chosen)
    try:
        if chosen is None:
            return _next(parent, _slug(name))
        chosen.mkdir(parents=True, exist_ok=True)
        return chosen
    except OSError as error:
        where = str(chosen or parent)
        remedy = "name another folder with -o"
        raise InputError(f"the folder cannot be made: {error.strerror}", where=where, remedy=remedy) from None


def check_output(
    folder: Path | None, remedy: str = "name a new folder with -o, or leave -o out: runs/NAME-NUMBER is always new"
) -> None:
    """Raise InputError when ``folder`` cannot be an output folder: before a long run, not after it.

    ``remedy``: what to do about one that is in use.
    """
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file, not a folder", where=str(folder), remedy="name a new folder with -o")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError("the output folder is not empty", where=str(folder), remedy=remedy)


def _next(parent: Path, slug: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    pattern = re.compile(rf"{re.escape(slug)}-(\d+)")
    taken = [int(found[1]) for child in parent.iterdir() if (found := pattern.fullmatch(child.name))]
    number = max(taken, default=0) + 1
    while True:
        try:
            (parent / f"{slug}-{number}").mkdir()
        except FileExistsError:  # another run took it between the look and the make
            number += 1
        else:
            return parent / f"{slug}-{number}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:60] or "run"
