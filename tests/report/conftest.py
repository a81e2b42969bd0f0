import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "metrics"))

from queue_model import queue_run


@pytest.fixture(scope="session")
def make_run():
    return queue_run


@pytest.fixture(scope="session")
def run():
    return queue_run(120, slo={"ttft_ms": {"p99": 6.5}}, name="a <run> & its name")
