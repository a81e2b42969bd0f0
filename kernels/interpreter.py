"""Triton's interpreter, which runs kernels on the CPU for tests: whether it is on, and one repair."""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on the CPU, in Triton's interpreter: it looks at the environment when it is imported."""


def _mend_loop_bounds() -> None:
    """Triton 3.6 takes the bound of a loop from an array of one element, which numpy refuses since 2.4.

    github.com/triton-lang/triton/issues/9171
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = mended


if INTERPRETED:
    _mend_loop_bounds()
