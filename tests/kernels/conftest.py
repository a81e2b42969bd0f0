from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from testbed.kernels.interpreter import INTERPRETED


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: in the interpreter on the CPU, or on a GPU where the environment says so."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
