import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "metrics"))

from queue_model import queue_run


@pytest.fixture(scope="session")
def make_run():
    return queue_run
