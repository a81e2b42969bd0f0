"""What is read off a run's own records about its executor: every token of every request, and each kind of fault."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from testbed import api
from testbed.metrics.run import Run
from testbed.scenario.schema import ConstantDevice
from testbed.study.confirm.decisions import ids_by_rank
from testbed.study.confirm.executor import executor_faults, sent_tokens
from tests.properties.draws import World, worlds
from tests.properties.world import Outcome, burst, engine, run
from tests.study.mutants import scenario

QUICK = ConstantDevice(prefill_ns=4_000, decode_ns=2_000)


def tokens_by_id(outcome: Outcome) -> dict[str, dict[int, int]]:
    """The tokens that ``sent_tokens`` finds, by id and position."""
    made = Run({}, outcome.records)
    journal = outcome.records.journal
    assert journal is not None and journal.keeps_tokens
    ids = ids_by_rank(made)
    found: dict[str, dict[int, int]] = {rid: {} for rid in ids}
    for tokens in sent_tokens(made, journal):
        rows = zip(tokens.ranks.tolist(), tokens.positions.tolist(), tokens.token_ids.tolist(), strict=True)
        for rank, position, token_id in rows:
            found[ids[rank]][position] = token_id
    return found


def every_token_is_found(outcome: Outcome) -> None:
    found = tokens_by_id(outcome)
    for rid, output in outcome.outputs.items():
        expected = dict(enumerate(output.output_ids.tolist())) if output.status == 200 else {}
        assert {k: v for k, v in found.get(rid, {}).items() if expected} == expected, rid


@given(worlds())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_token_is_found_by_request_and_position(world: World) -> None:
    """Whatever the engine does, the decisions and the results tell each request's output, token by token."""
    every_token_is_found(run(world.config, world.jobs, kv_tokens=world.kv_tokens, device=QUICK, paced=True))


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.parametrize("batching", ["prefill_first", "mixed_chunk", "stall_free"])
def test_also_where_requests_are_retracted_and_cut(loop: str, batching: str) -> None:
    """A retracted request is prefilled again in chunks that end behind its prompt: only the last yields a token."""
    config = engine(loop=loop, batching=batching, chunked_prefill_size=16, clip_max_new_tokens=1)
    outcome = run(config, burst(6, 18, 30), kv_tokens=80, device=QUICK, paced=True)
    assert outcome.column("retractions").sum() > 0
    every_token_is_found(outcome)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A simulation and a paced run of it."""
    true = scenario(tmp_path_factory.mktemp("hosts"))
    return api.simulate(true), api.execute(true, paced=True)


def test_a_sound_run_has_no_fault(sound: tuple[Run, Run]) -> None:
    simulated, real = sound
    assert executor_faults(real, simulated) == []
    assert executor_faults(simulated, simulated) == [], "a simulation keeps no tokens: nothing to check"


def test_any_single_wrong_token_is_found(sound: tuple[Run, Run]) -> None:
    simulated, real = sound
    journal = real.records.journal
    assert journal is not None
    ids, rng = ids_by_rank(real), np.random.default_rng(0)
    sent = [(one.step, row) for one in sent_tokens(real, journal) for row in range(len(one.ranks))]
    sites = {one.step: one for one in sent_tokens(real, journal) if len(one.ranks) > 1}
    assert len(sent) == sum(real.records.requests["output_tokens"])
    for step in rng.choice(sorted(sites), 12, replace=False).tolist():
        tokens = journal.tokens[step]
        places = [place for place in range(len(tokens)) if tokens[place] in sites[step].token_ids]
        place = int(rng.choice(places))
        row = sites[step].token_ids.tolist().index(tokens[place])
        before = int(tokens[place])
        tokens[place] = (before + 7) % 150_000
        (fault,) = executor_faults(real, simulated)
        tokens[place] = before
        rid, position = ids[sites[step].ranks[row]], sites[step].positions[row]
        assert (fault.kind, fault.request, fault.number) == ("wrong token", rid, 1)
        assert fault.told.startswith(f"token {position} of {rid} (step {step})")


def test_a_step_with_too_few_tokens(sound: tuple[Run, Run]) -> None:
    simulated, real = sound
    journal = real.records.journal
    assert journal is not None
    whole = journal.tokens[40]
    journal.tokens[40] = whole[:-1]
    faults = executor_faults(real, simulated)
    journal.tokens[40] = whole
    assert faults[0].kind == "no token" and faults[0].number == 1 and faults[0].told.startswith("step 40 gave")


def with_column(made: Run, name: str, place: int, value: int) -> Run:
    table = made.records.requests
    column = np.array(table[name])
    column[place] = value
    return Run(made.scenario, replace(made.records, requests={**table, name: column}), made.meta)


def test_a_request_of_another_length(sound: tuple[Run, Run]) -> None:
    simulated, real = sound
    tokens = int(simulated.records.requests["output_tokens"][2])
    (fault,) = executor_faults(real, with_column(simulated, "output_tokens", 2, tokens + 1))
    assert (fault.kind, fault.request) == ("length", "r2")
    assert fault.told == f"r2 has {tokens} tokens; asked were {tokens + 1}"
    told_another_limit = with_column(with_column(simulated, "output_tokens", 2, tokens + 1), "max_new_tokens", 2, 65)
    assert executor_faults(real, told_another_limit) == []


def test_where_the_model_chooses_tokens_are_its_own(sound: tuple[Run, Run]) -> None:
    """Not forced to the oracle's tokens: none is wrong, and a request that may stop at one may be of any length."""
    simulated, real = sound
    journal = real.records.journal
    assert journal is not None
    own = Run(real.scenario, real.records, {**real.meta, "label": "real"})
    forced = Run({**real.scenario, "tokens": "oracle"}, real.records, own.meta)
    shorter = with_column(simulated, "output_tokens", 2, 3)
    heeds_eos = not {message.rid: message for _, message in journal.arrivals}["r2"].ignore_eos
    assert heeds_eos and executor_faults(own, shorter) == []
    assert [fault.kind for fault in executor_faults(forced, shorter)] == ["length"]
    before = journal.tokens[40].copy()
    journal.tokens[40][:] = 1
    faults = [executor_faults(one, simulated) for one in (own, forced)]
    journal.tokens[40][:] = before
    assert faults[0] == [] and [fault.kind for fault in faults[1]] == ["wrong token"]
