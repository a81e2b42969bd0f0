from __future__ import annotations

from testbed.scenario.describe import allowed, did_you_mean, field_key, field_type, literals
from testbed.scenario.schema import Scenario


def words(*path: str) -> str:
    place = field_type(Scenario, path)
    assert place is not None
    return allowed(*place)


def test_words_come_from_the_schema() -> None:
    assert words("engine", "batching").startswith("prefill_first | mixed_chunk | stall_free | static | package.module")
    assert words("engine", "chunked_prefill_size") == "a whole number above 0 | -1"
    assert words("engine", "mem_fraction_static") == "a number above 0 and below 1"
    assert words("engine", "priority") == "true | false"
    assert words("engine", "context_length") == "a whole number above 0"
    assert words("percentiles") == "a list of: a number above 0 and below 100"
    assert words("measure", "until") == "drained | last_arrival | {seconds: a number above 0}"
    assert "{kind: fixed | uniform" in words("workload", "lengths", "prompt_tokens")


def test_every_field_can_be_described() -> None:
    for name, info in Scenario.model_fields.items():
        assert "typing." not in words(name) and "<class" not in words(name), (name, info)


def test_keys_and_unknown_paths() -> None:
    assert field_key(Scenario, ("slo", "ttft_ms")) == "mean | p50 | p99 | p99.9"
    assert field_type(Scenario, ("engine", "nothing")) is None
    assert field_type(Scenario, ("model", "nothing")) is None


def test_hints() -> None:
    place = field_type(Scenario, ("engine", "loop"))
    assert place is not None
    assert did_you_mean("Overlapp", literals(place[0])) == "did you mean 'overlap'?"
    assert did_you_mean("zzz", literals(place[0])) == ""
