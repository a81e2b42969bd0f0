"""The overlapped loop gains what the formula says, and changes no token."""

from __future__ import annotations

import pytest

from testbed.tokens import oracle_key, token_ids
from tests.laws.exact_laws import SCENARIOS
from tests.laws.overlap import study, token_streams


def test_gain_is_that_of_the_formula() -> None:
    """Equal times, host bound, device bound; 1 % where 2 are asked for."""
    experiment = study()
    swept = experiment.sweep((0.5, 2.0, 3.0), 60)
    assert len(swept) == 9
    assert experiment.off_percent(swept, "simulated") < 1
    assert swept["simulated"].max() == pytest.approx(1.0, abs=0.01)  # never more than twice as fast


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_token_streams_are_equal(name: str) -> None:
    normal, overlap = token_streams(name, "normal"), token_streams(name, "overlap")
    assert normal == overlap
    assert len(normal) >= 150 and all(normal.values())


def test_tokens_are_those_of_the_oracle() -> None:
    """Equality above would also hold if both loops sent the same wrong tokens."""
    from testbed.scenario.models import load_model

    vocabulary = load_model(SCENARIOS["sessions"]["model"]).vocab
    for rid, sent in token_streams("sessions", "overlap").items():
        assert sent == tuple(token_ids(oracle_key(0, rid), 0, len(sent), vocabulary).tolist())
