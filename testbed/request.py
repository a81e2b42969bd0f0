"""A request as the scheduler holds it, and the closed set of reasons for which it ends."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

NEVER = -1
"""A time stamp (ns) that has not happened."""


class FinishReason(StrEnum):
    """Why a request ended; every accepted request ends with exactly one of them."""

    LENGTH = "length"
    STOP = "stop"
    ABORT = "abort"
    ERROR = "error"
