"""One progress bar for a run: requests, rate, running and waiting, virtual against wall time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, int, int, int | None], None]
"""Called with (virtual_ns, finished, running, waiting, total if known)."""


@contextmanager
def progress_bar(name: str, show: bool) -> Iterator[Progress | None]:
    """A callable that draws on stderr while the block runs; None when there is no terminal to draw on."""
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    begin_s = time.monotonic()

    def line(virtual_ns: int, finished: int, running: int, waiting: int, total: int | None) -> Text:
        wall_s = time.monotonic() - begin_s
        virtual_s = virtual_ns / 1e9
        rate = f"{finished / wall_s:,.0f}/s" if wall_s > 0.2 else "-"
        speed = f"{virtual_s / wall_s:,.0f}x" if wall_s > 0.2 else "-"
        done = f"{finished:,} finished" if total is None else f"{finished:,} of {total:,} finished"
        left_s = None if total is None or not finished else wall_s * (total - finished) / finished
        left = "" if left_s is None else f"  {left_s:,.0f} s left"
        return Text(
            f"{name}  {done} ({rate}){left}  {running:,} running  {waiting:,} waiting  "
            f"{virtual_s:,.1f} s in {wall_s:,.1f} s ({speed})",
            no_wrap=True,
            overflow="ellipsis",
        )

    with Live(line(0, 0, 0, 0, None), console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        yield lambda *state: live.update(line(*state), refresh=True)
