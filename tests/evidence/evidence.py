"""What a line of evidence reports."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Evidence:
    """One figure against its bar."""

    figure: str
    """What was found, with its unit."""
    bar: str
    """What was asked for."""
    passed: bool
    details: tuple[str, ...] = field(default=())
    """Lines that explain the figure; of a failure, what failed."""
