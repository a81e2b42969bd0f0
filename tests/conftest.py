"""Read before any test file, so before anybody imports Triton, which looks at the environment only then."""

from __future__ import annotations

import os

# Kernels run on the CPU, in Triton's interpreter; TRITON_INTERPRET=0 runs their tests on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
