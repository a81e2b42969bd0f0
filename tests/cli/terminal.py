"""A ``testbed`` command as a terminal runs it: stderr is one, and Ctrl-C reaches its whole process group."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

PATIENCE_S = 120.0
"""No wait is longer, where nothing else is said: a hang is a failure."""
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    stdout: str
    stderr: str
    """What the terminal showed, the progress bar included."""


class Command:
    """A running command. Leaving the block ends it, whatever it does."""

    def __init__(self, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None) -> None:
        self._stdout = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the command)
        self._terminal, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "testbed.cli.main", *arguments],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "160", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._shown = ""
        self.workers_seen: set[int] = set()
        """Every child process that was seen while waiting."""

    def _children(self) -> set[int]:
        file = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        try:
            found = {int(pid) for pid in file.read_text().split()}
        except (FileNotFoundError, ProcessLookupError):
            found = set()
        self.workers_seen |= found
        return found

    def _look(self) -> None:
        """Take up what the terminal shows, and the children; waits a moment for more."""
        self._children()
        if select.select([self._terminal], [], [], 0.05)[0]:
            try:
                self._shown += os.read(self._terminal, 1 << 16).decode()
            except OSError:  # Linux: nobody has the other side open any more
                time.sleep(0.05)

    def _until(self, holds: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        late = time.monotonic() + patience_s
        while not holds():
            assert time.monotonic() < late, f"waited in vain for {what}; shown: {self._shown[-1000:]}"
            self._look()

    def wait_for(self, pattern: str) -> None:
        """Until the terminal shows ``pattern``."""

        def shown() -> bool:
            assert self._process.poll() is None, f"ended before {pattern!r}: {self._shown[-2000:]}"
            return re.search(pattern, COLOURS.sub("", self._shown)) is not None

        self._until(shown, repr(pattern))

    def worker(self) -> int:
        """The id of its worker process, as soon as there is one."""
        self._until(lambda: bool(self._children()), "a worker process")
        (pid,) = self._children()
        return pid

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.killpg(self._process.pid, signal.SIGINT)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def ended(self, patience_s: float = PATIENCE_S) -> Ended:
        """Wait for its end."""
        self._until(lambda: not self.is_running, "the end", patience_s)
        while select.select([self._terminal], [], [], 0)[0]:
            before = self._shown
            self._look()
            if before == self._shown:
                break
        self._stdout.seek(0)
        return Ended(self._process.returncode, self._stdout.read().decode(), COLOURS.sub("", self._shown))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_running:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._stdout.close()
        os.close(self._terminal)


def is_alive(pid: int) -> bool:
    """Whether a process still does anything; one that ended and was not asked for its status does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
