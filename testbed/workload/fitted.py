"""Tables fitted to public traces and shipped with the project: real shapes without the data (see ``derive.py``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

import numpy as np

from testbed.scenario.errors import InputError
from testbed.workload.draw import Floats, table


@dataclass(frozen=True)
class FittedTable:
    """What ``derive`` found in a trace."""

    source: str
    licence: str
    citation: str
    minute_rates_per_s: tuple[float, ...]
    gap_cv: float
    """Of the gaps in operational time."""
    prompt_probabilities: Floats
    prompt_tokens: Floats
    output_probabilities: Floats
    output_tokens: Floats
    """float64 [bands, probabilities]: one row for each band of equally many prompts, short prompts first."""

    def prompts(self, u: Floats) -> Floats:
        """Prompt lengths, float64 [n], of probabilities ``u``."""
        return table(self.prompt_probabilities, self.prompt_tokens, u)

    def outputs(self, u_prompt: Floats, u: Floats) -> Floats:
        """Output lengths, float64 [n], of probabilities ``u`` for prompts drawn with ``u_prompt``."""
        band = (u_prompt * len(self.output_tokens)).astype(np.int64)
        step = np.searchsorted(self.output_probabilities, u, side="right") - 1
        left, right = self.output_probabilities[step], self.output_probabilities[step + 1]
        low, high = self.output_tokens[band, step], self.output_tokens[band, step + 1]
        draws: Floats = low + (high - low) * (u - left) / (right - left)
        return draws

    def all_outputs(self, u: Floats) -> Floats:
        """Output lengths, float64 [n], whatever the prompt: one number picks the band and the place in it."""
        scaled = u * len(self.output_tokens)
        return self.outputs(u, np.maximum(scaled - np.floor(scaled), 2.0**-53))


def fitted_names() -> list[str]:
    """The names of all tables."""
    return sorted(entry.name.removesuffix(".json") for entry in _folder().iterdir() if entry.name.endswith(".json"))


@cache
def fitted_table(name: str) -> FittedTable:
    """The table of this name; raises InputError, with the names there are, when there is none."""
    if name not in fitted_names():
        raise InputError(
            "there is no such fitted table",
            where=name,
            remedy=f"one of {', '.join(fitted_names())}; see docs/workloads.md",
        )
    data = json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8"))
    lengths = data["lengths"]
    return FittedTable(
        source=data["source"],
        licence=data["licence"],
        citation=data["citation"],
        minute_rates_per_s=tuple(data["arrivals"]["minute_rates_per_s"]),
        gap_cv=data["arrivals"]["gap_cv"],
        prompt_probabilities=np.array(lengths["prompt_probabilities"]),
        prompt_tokens=np.array(lengths["prompt_tokens"]),
        output_probabilities=np.array(lengths["output_probabilities"]),
        output_tokens=np.array(lengths["output_tokens_by_prompt_band"]),
    )


def _folder() -> Traversable:
    return files("testbed.workload") / "fitted"
