"""Many clients at once: exact streams, no trace of those who leave, overload. Full sizes: the evidence of serve.4."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.crowd import crowd, options
from tests.server.hostile.footprint import held, left_behind
from tests.server.serving import Serving, serving

STEP_NS = 20_000_000
RUNNING, QUEUED, TOKENS = 256, 32, 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("crowds"), *options(STEP_NS, RUNNING, QUEUED, workers=2)) as found:
        yield found


def test_two_hundred_streams_at_once_have_exactly_their_tokens(server: Serving) -> None:
    found = crowd("streams", port=server.port, count=200, tokens=100, workers=2)
    assert found["wrong"] == [] and found["most"] >= 100
    server.comes_to_rest()


def test_clients_who_leave_or_abort_leave_nothing(server: Serving) -> None:
    """B4, B7, B9: at random moments, with and without streams, several choices, FIN and RST, also twice and at once."""
    crowd("leavers", port=server.port, count=20, at_once=20, tokens=50, workers=2, seed=0, prefix="first")
    before = held(server, 2)
    found = crowd("leavers", port=server.port, count=400, at_once=40, tokens=100, workers=2, seed=1)
    assert found["wrong"] == [] and sum(found["ends"].values()) == 400
    assert found["ends"]["abort"] > 50 and len(found["ways"]) == 6
    assert left_behind(server, 2, before) == []
    assert server.errors == ""


def test_more_than_can_be_served_is_told_to_come_again(server: Serving) -> None:
    """All are answered, with 200 or with 503 and a time; those behind the flood are all served."""
    found = crowd("overload", port=server.port, phases=[[100, 1], [1500, 1]], tokens=TOKENS)
    assert len(found) == 1600 and {status for _, _, _, status, _ in found} == {200, 503}
    assert all((status == 503) == (retry >= 1) for _, _, _, status, retry in found)
    server.comes_to_rest()
    after = crowd("overload", port=server.port, phases=[[50, 1]], tokens=TOKENS)
    assert [status for _, _, _, status, _ in after] == [200] * 50
    server.comes_to_rest()
