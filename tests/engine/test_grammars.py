"""Constrained requests on a model with random weights: outputs that match, the same in every company, beside requests
that do not know of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from testbed.engine.build import LocalDevice, build_runner
from testbed.messages import GrammarReady, GrammarSpec
from testbed.runtime.wall import WallRuntime
from testbed.sampling import SamplingParams
from testbed.scheduler.batching import STRATEGIES
from testbed.scheduler.scheduler import Scheduler
from testbed.server.grammar import Compiled, ServerGrammars
from testbed.server.options import OWN_TOKENIZER
from testbed.server.trial import TrialOptions, build, load_tokenizer, read_grammar
from testbed.workload.base import TimedRequest
from tests.engine.against_transformers import CONTEXT, Asked, Retracting, Setting, options_of, shared_prompts
from tests.engine.machine import runs_on
from tests.engine.seeded import ALONE, COMPANIES
from tests.engine.world import tiny_model
from tests.properties.world import Outcome, drained, ended_once, engine, run, times_add_up, work_adds_up
from tests.server.serving import TOKENIZER

VOCAB = 4096
OUTPUTS = 60
REQUESTS = 24
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS: tuple[tuple[GrammarSpec | None, Callable[[str], Any]], ...] = (
    (GrammarSpec("json_schema", json.dumps(PERSON)), lambda text: list(json.loads(text)) == ["name", "age"]),
    (None, lambda text: True),
    (GrammarSpec("regex", "(red|green|blue), [0-9]{2,5}!"), re.compile("(red|green|blue), [0-9]{2,5}!").fullmatch),
    (GrammarSpec("json_object"), lambda text: isinstance(json.loads(text), dict)),
    (GrammarSpec("ebnf", 'root ::= "<" [a-f]+ ">" | "none"'), re.compile("<[a-f]+>|none").fullmatch),
)
KINDS = (
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.5, repetition_penalty=1.3),
)


@dataclass(frozen=True)
class Constrained(Asked):
    """A request with a grammar, perhaps."""

    grammar: GrammarSpec | None = None

    def timed(self) -> TimedRequest:
        timed = super().timed()
        return timed._replace(request=msgspec.structs.replace(timed.request, grammar=self.grammar))


class AtOnce(ServerGrammars):
    """Compiled where they are asked for."""

    def compile(self, rank: int, spec: GrammarSpec) -> None:
        self._hand_out(rank, Compiled(build(self._tokenizer, read_grammar(spec.kind, spec.text)), 0))


def requests() -> list[Constrained]:
    return [
        Constrained(i, prompt, OUTPUTS, i % 7, replace(KINDS[i % 3], seed=i), grammar=GRAMMARS[i % 5][0])
        for i, prompt in enumerate(shared_prompts(40, REQUESTS, VOCAB))
    ]


def company(folder: Path, setting: Setting, asked: Sequence[Asked]) -> Outcome:
    """The requests on a device of this setting."""
    device = LocalDevice(build_runner(options_of(folder, setting), torch.device("cpu")))
    config = engine(
        loop=setting.loop,
        batching=setting.batching,
        chunked_prefill_size=setting.page_size + 8 * setting.seats if setting.chunked else -1,
        prefix_cache="radix" if setting.cached else "none",
        page_size=setting.page_size,
        max_running_requests=setting.seats,
    )
    strategy = STRATEGIES[setting.batching]()
    made: list[AtOnce] = []
    trial = TrialOptions(str(folder), VOCAB, device.info.eos_token_ids, 1000, 256)

    def before(scheduler: Scheduler, runtime: WallRuntime) -> None:
        made.append(AtOnce(trial, VOCAB, 64, lambda ready: runtime.post_at(0, ready), os.sched_getaffinity(0)))
        runtime.grammars = made[0]

    jobs: Any = asked
    outcome = run(
        config,
        jobs,
        kv_tokens=device.info.kv_tokens,
        context_length=CONTEXT,
        strategy=Retracting(strategy, seed=5) if setting.forced else strategy,
        prove=False,
        device_of=runs_on(device, forced=False),
        before=before,
    )
    made[0].close()
    assert made[0].open == 0
    for law in (ended_once, times_add_up, work_adds_up):
        law(outcome)
    drained(outcome.scheduler)
    return outcome


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3", seed=9)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Outcome:
    return company(folder, ALONE, requests())


def differing(one: Outcome, other: Outcome, asked: Sequence[Asked]) -> int:
    """Requests with other tokens: a close call may fall otherwise in another company (see ``tests.engine.seeded``)."""
    return sum(one.streams()[request.rid] != other.streams()[request.rid] for request in asked)


def test_what_is_written_matches(alone: Outcome) -> None:
    """Whole where it ends, a beginning where it is cut off."""
    ended = [0] * len(GRAMMARS)
    for request in requests():
        output, (spec, matches) = alone.outputs[request.rid], GRAMMARS[request.number % 5]
        tokens = output.output_ids.tolist()
        if spec is not None and output.finish_reason == "stop":
            text = TOKENIZER.decode(tokens[:-1], skip_special_tokens=False)
            assert matches(text), text
            ended[request.number % 5] += 1
        elif spec is not None:
            assert output.finish_reason == "length" and len(tokens) == OUTPUTS
            assert matcher(spec).try_consume_tokens(tokens) == OUTPUTS
    assert ended[2] and ended[4] and sum(ended) > 8


def matcher(spec: GrammarSpec) -> Any:
    return build(tokenizer(), read_grammar(spec.kind, spec.text))


@cache
def tokenizer() -> Any:
    return load_tokenizer(TrialOptions(str(OWN_TOKENIZER), VOCAB, (1,), 1000, 256))


@pytest.mark.parametrize("setting", COMPANIES, ids=str)
def test_the_same_tokens_in_every_company(folder: Path, alone: Outcome, setting: Setting) -> None:
    asked = requests()
    outcome = company(folder, setting, asked)
    assert differing(alone, outcome, asked) < 3
    if setting.forced:
        assert sum(request.retractions > 0 and request.old_outputs > 0 for request in outcome.requests.values()) > 5
    constrained = [batch.has_grammar for batch, _ in outcome.batches]
    assert any(constrained)


@pytest.mark.parametrize("setting", COMPANIES[1:3], ids=str)
def test_others_do_not_know_of_it(folder: Path, alone: Outcome, setting: Setting) -> None:
    """The requests without a grammar, by themselves."""
    asked = [request for request in requests() if request.grammar is None]
    assert differing(alone, company(folder, setting, asked), asked) < 2


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_a_row_without_a_token_ends_its_request(folder: Path, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its tokens are forbidden from some output on (menu H19)."""
    masks = AtOnce.masks

    def failing(self: AtOnce, batch: Any) -> Any:
        found = masks(self, batch)
        rows = [*(prefill.request for prefill in batch.prefills), *batch.decodes]
        for row, request in enumerate(rows):
            if found is not None and request.rid == "r0" and request.grammar is not None and request.in_running:
                found[row] = 0
        return found

    monkeypatch.setattr(AtOnce, "masks", failing)
    setting = ALONE._replace(loop=loop, seats=8)
    asked = [request for request in requests()[:8] if request.number != 3]
    outcome = company(folder, setting, asked)
    end = outcome.outputs["r0"]
    assert (end.finish_reason, end.status, len(end.output_ids)) == ("error", 400, 1)
    assert all(output.status == 200 for rid, output in outcome.outputs.items() if rid != "r0")


def test_ready_is_a_message(folder: Path) -> None:
    """It is in the journal, in order."""
    outcome = company(folder, ALONE._replace(loop="overlap", seats=4), requests()[:5])
    ready = [m.rank for _, m in outcome.records.journal.arrivals if isinstance(m, GrammarReady)]  # type: ignore[union-attr]
    assert sorted(ready) == sorted(r.rank for r in outcome.requests.values() if r.grammar is not None)
