"""The chart's results as a table: a row a cell and seed, kept as CSV, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from tests.decision_chart.cells import LAYOUTS, MACHINES, SEEDS, WORKLOADS, Cell, capacity, cells

FOLDER = Path(__file__).parents[2] / "reports" / "decision_chart"
PLACE = list(Cell._fields)
LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its 95 % interval (Student's t)."""

    mean: float
    half: float

    @property
    def is_settled(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.mean) > self.half


def rows_of(cell: Cell, seeds: Sequence[int], count: int | None = None) -> list[dict[str, object]]:
    """A row a seed. ``count``: requests of a run, None: the workload's."""
    devices = LAYOUTS[cell.layout].devices
    return [
        {**cell._asdict(), "seed": seed, "devices": devices, **capacity(cell, seed, count)._asdict()} for seed in seeds
    ]


def write(rows: pd.DataFrame) -> None:
    """Keep the table, in the order of the chart."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    number = {(*cell, seed): n for n, (cell, seed) in enumerate(product(cells(), SEEDS))}
    rows = rows.set_index([*PLACE, "seed"], drop=False)
    rows.iloc[np.argsort([number[place] for place in rows.index])].to_csv(
        FOLDER / "cells.csv", index=False, float_format="%.6g"
    )


def read() -> pd.DataFrame:
    """The table that is kept; empty where there is none."""
    path = FOLDER / "cells.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=[*PLACE, "seed"])


def per_device(table: pd.DataFrame) -> pd.Series:
    """Rate per device (requests/s) by machine, host, workload, layout and seed."""
    indexed = table.set_index([*PLACE, "seed"])
    return indexed["rate_per_s"] / indexed["devices"]


def estimate(values: pd.Series) -> Estimate:
    """Of one value a seed."""
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(float(values.mean()), float(half))


def change(rates: pd.Series, place: tuple[str, str, str], layout: str, base: str) -> Estimate:
    """How much more ``layout`` does than ``base`` in percent, seed by seed: the same requests."""
    return estimate((rates[(*place, layout)] / rates[(*place, base)] - 1) * 100)


def best(rates: pd.Series, place: tuple[str, str, str], layouts: Sequence[str]) -> list[str]:
    """The best layout, and those that cannot be told from it: the interval of its gain over them holds 0."""
    means = {layout: float(rates[(*place, layout)].mean()) for layout in layouts}
    first, *others = sorted((layout for layout in layouts if means[layout]), key=lambda layout: -means[layout])
    return [first, *(other for other in others if not change(rates, place, first, other).is_settled)]


def places() -> list[tuple[str, str, str]]:
    """(machine, host, workload) of the chart, in order."""
    return [(name, host, load) for name, machine in MACHINES.items() for host in machine.hosts for load in WORKLOADS]
