"""How long prompts and outputs are: endless draws of (prompt, output) in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from testbed.scenario.errors import InputError
from testbed.scenario.workload import Distribution, Empirical, FittedLengths, IndependentLengths, Lengths, PairLengths
from testbed.workload.draw import (
    Floats,
    Quantiles,
    Uniforms,
    blocks,
    parametric,
    quantile_table,
    sample,
    whole_tokens,
)
from testbed.workload.fitted import FittedTable, fitted_table
from testbed.workload.traces.reader import find_trace, read_trace

Role = Literal["prompt_tokens", "output_tokens", ""]
"""Which lengths of a trace or table a field means by itself; "": none."""


def quantiles_of(law: Distribution, base_dir: Path, role: Role = "", *, whole: bool = False) -> Quantiles:
    """The inverse distribution function that a scenario describes; ``whole`` when the draws will be rounded.

    Raises InputError when it names a file or a table that is not there.
    """
    if not isinstance(law, Empirical):
        return parametric(law, whole=whole)
    if law.quantiles is not None:
        return quantile_table(law)
    column = law.column or role
    if not column:
        raise InputError("column is missing", where="workload", remedy="column: prompt_tokens or output_tokens")
    if law.name is not None:
        fitted = fitted_table(law.name)
        return fitted.prompts if column == "prompt_tokens" else fitted.all_outputs
    prompts, outputs = _columns(str(law.file), base_dir)
    return partial(sample, prompts if column == "prompt_tokens" else outputs)


def token_draws(law: Distribution, seed: int, name: str, base_dir: Path, role: Role = "") -> Iterator[int]:
    """Endless whole numbers from 1 on, drawn from the generator called ``name``."""
    quantiles = quantiles_of(law, base_dir, role, whole=True)
    for u in blocks(Uniforms(seed, name)):
        yield from whole_tokens(quantiles(u)).tolist()


def length_draws(law: Lengths, seed: int, base_dir: Path) -> Iterator[tuple[int, int]]:
    """Endless (prompt tokens, output tokens), each at least 1."""
    if isinstance(law, IndependentLengths):
        return zip(
            token_draws(law.prompt_tokens, seed, "prompt lengths", base_dir, "prompt_tokens"),
            token_draws(law.output_tokens, seed, "output lengths", base_dir, "output_tokens"),
            strict=False,
        )
    if isinstance(law, FittedLengths):
        return _fitted_pairs(fitted_table(law.name), seed)
    return _sampled_pairs(law, seed, base_dir)


def _fitted_pairs(fitted: FittedTable, seed: int) -> Iterator[tuple[int, int]]:
    draws = zip(blocks(Uniforms(seed, "prompt lengths")), blocks(Uniforms(seed, "output lengths")), strict=False)
    for u_prompt, u_output in draws:
        prompts = whole_tokens(fitted.prompts(u_prompt)).tolist()
        yield from zip(prompts, whole_tokens(fitted.outputs(u_prompt, u_output)).tolist(), strict=True)


def _sampled_pairs(law: PairLengths, seed: int, base_dir: Path) -> Iterator[tuple[int, int]]:
    if law.pairs is not None:
        pairs = np.array(law.pairs, dtype=np.int64)
    else:
        pairs = np.stack(_columns(str(law.file), base_dir), axis=1).astype(np.int64)
    for u in blocks(Uniforms(seed, "length pairs")):
        yield from map(tuple, pairs[(u * len(pairs)).astype(np.int64)].tolist())


def _columns(file: str, base_dir: Path) -> tuple[Floats, Floats]:
    """The lengths of a trace, float64 [rows] each; rows without output are left out (nothing was generated)."""
    rows = [row for row in read_trace(find_trace(file, base_dir)) if row.output_tokens]
    if not rows:
        raise InputError("no row has an output", where=file, remedy="give a trace with output lengths")
    return (
        np.array([row.prompt_tokens for row in rows], np.float64),
        np.array([row.output_tokens for row in rows], np.float64),
    )
