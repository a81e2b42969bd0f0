"""Greedy tokens, logits and log-probabilities equal to ``transformers``, for six families over a covering array.

Each family's tiny random model (deviation 0.3, float32, CPU) answers the same random prompts under every setting of
``tests.engine.against_transformers``, whose docstring states the margin rule. At full size the result is written to
``reports/engine_exactness/README.md``.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from tests.engine.against_transformers import (
    MARGIN,
    MOST_EXCUSED,
    PORTABLE,
    TOLERANCE,
    Comparison,
    Held,
    Tally,
    all_settings,
    hold_family,
)
from tests.engine.world import FAMILIES
from tests.evidence.evidence import Evidence, commit_page

REQUESTS = 200
SMOKE_REQUESTS = 40


def check(smoke: bool) -> Evidence:
    """Every family under every setting; in the smoke size each setting is run by two of the families."""
    torch.set_num_threads(1)
    requests = SMOKE_REQUESTS if smoke else REQUESTS
    settings = all_settings()
    held: dict[str, list[Held]] = {}
    for number, family in enumerate(FAMILIES):
        chosen = settings[number % 3 :: 3] if smoke else settings
        with TemporaryDirectory() as folder:
            held[family] = hold_family(family, Path(folder) / family, chosen, requests)
    every = [(family, one) for family, all_of_it in held.items() for one in all_of_it]
    total = sum_of([one for _, one in every])
    problems = [f"{family}: {line}" for family, one in every for line in one.happened.lacking(one.setting, requests)]
    problems += [f"{family}, {one.setting}: {line}" for family, one in every for line in one.comparison.wrong]
    failed = sum(not one.comparison.holds for _, one in every)
    tolerance = PORTABLE if smoke else TOLERANCE
    error = max(total.logits.error, total.logprobs.error)
    evidence = Evidence(
        figure=f"{total.tokens.compared} tokens in {len(every)} runs ({requests} prompts a family): {failed} runs "
        f"differ; largest error of logits {total.logits.error:.1e}, of log-probabilities {total.logprobs.error:.1e}",
        bar=f"none differs; errors at most {tolerance:.0e}; what is excused follows a close call (the reference's two "
        f"best logits, or the experts at the edge of the chosen, are less than {MARGIN:.0e} apart) and is at most "
        f"{MOST_EXCUSED:.0%}; every run goes through what its setting asks for",
        passed=not failed and not problems and error <= tolerance,
        details=(*problems, *(line_of(family, found) for family, found in held.items()), "", *ways(held), "", basis()),
    )
    if not smoke:
        commit_page("engine_exactness", "The engine against transformers", "engine.1", evidence)
    return evidence


def sum_of(held: list[Held]) -> Comparison:
    """All comparisons as one."""
    total = Comparison()
    for one in held:
        total.add(one.comparison)
    return total


def line_of(family: str, held: list[Held]) -> str:
    """A family's figures over its settings."""
    found = sum_of(held)
    return (
        f"{family}: tokens {counts(found.tokens)}, {found.close} close calls; logits {counts(found.logits)}, error "
        f"{found.logits.error:.1e}; log-probabilities {counts(found.logprobs)}, error {found.logprobs.error:.1e}"
    )


def counts(tally: Tally) -> str:
    """How many, and how many of them were excused."""
    return f"{tally.compared} ({tally.excused} excused)"


def ways(held: dict[str, list[Held]]) -> list[str]:
    """What each setting went through, by the first family that was run under it."""
    seen = {str(one.setting): one.happened for family in reversed(held) for one in held[family]}
    return [f"{setting}: {seen[setting]}" for setting in map(str, all_settings())]


def basis() -> str:
    """What it rests on."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}, one thread"
