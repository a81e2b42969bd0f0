"""Servers to attack, started once for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.hostile.target import target
from tests.server.serving import Serving


@pytest.fixture(scope="session")
def modelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two workers in front of a modelled device."""
    with target(tmp_path_factory.mktemp("modelled")) as found:
        yield found


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two workers in front of the tiny model."""
    with target(tmp_path_factory.mktemp("real"), modelled=False) as found:
        yield found


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One worker, so that an id has the same tokens each time; and few connections."""
    with target(tmp_path_factory.mktemp("single"), "--connections", "100", "--header-s", "30", workers=1) as found:
        yield found
