"""The torch backend runs where triton is not installed."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import sys

sys.modules["triton"] = None  # an import of it fails
import torch
from testbed.engine.backends.torch_backend import TorchBackend

print(TorchBackend().rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).sum().item())
"""


def test_the_torch_backend_needs_no_triton() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "4.0\n"), done.stderr
