"""The one exception for input that is wrong: it names the place and the remedy, and ends a command with status 2."""

from __future__ import annotations

from collections.abc import Sequence


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

    @property
    def errors(self) -> tuple[InputError, ...]:
        """Every single error: itself, or the errors of an ``InputErrors``."""
        return (self,)


class InputErrors(InputError):
    """Several errors found in one reading, so that a user can mend them all at once. Its own fields are the first's."""

    def __init__(self, errors: Sequence[InputError]) -> None:
        first = errors[0]
        super().__init__(first.message, where=first.where, remedy=first.remedy)
        self._errors = tuple(errors)

    @property
    def errors(self) -> tuple[InputError, ...]:
        """Every single error, in the order of the file."""
        return self._errors

    def __str__(self) -> str:
        """Each error as it prints itself, one below the other."""
        return "\n".join(str(error) for error in self._errors)


def raise_all(errors: Sequence[InputError]) -> None:
    """Raise what was found: nothing for none, the error itself for one, ``InputErrors`` for several."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InputErrors(errors)
