"""Triton, where it is installed. Where it is not (macOS, a lean machine) the references beside the kernels still work:
they are what a CPU runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _NoTriton:
    """Stands in: kernels are defined, and cannot be launched."""

    @staticmethod
    def jit(kernel: Callable[..., Any] | None = None, **_: object) -> Any:
        return kernel if kernel is not None else lambda function: function


try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:
    triton = tl = _NoTriton()
    AVAILABLE = False
