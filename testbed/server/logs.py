"""Logs of the server: one line an event on stderr, never a prompt, and nothing that a client can break a line with."""

from __future__ import annotations

import logging


class OneLine(logging.Formatter):
    """Control characters of the message, and all beyond ASCII, are written as escapes; tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return super().formatMessage(record).encode("unicode_escape").decode("ascii")


def set_up_logging() -> None:
    """Warnings and worse go to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of every client that speaks no HTTP
