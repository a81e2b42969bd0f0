"""The one exception for input that is wrong: it names the place and the remedy, and ends a command with status 2."""

from __future__ import annotations


class InputError(Exception):
    """Wrong input. ``where``: file:line:column, or the field path; ``remedy``: what to write instead."""

    def __init__(self, message: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        """``where: message`` and, on a line of its own, the remedy."""
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  {self.remedy}" if self.remedy else text
