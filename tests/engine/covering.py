"""Pairwise covering arrays: few rows in which every two settings meet (Cohen et al., "The AETG system", 1997)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = tuple[Any, ...]
Pair = tuple[int, Any, int, Any]
"""Two factors by number, each with a level."""


def pairs(row: Row) -> set[Pair]:
    """The pairs of levels that meet in ``row``."""
    return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}


def covering_array(factors: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Rows, each with a level of every factor in order, so that any two levels of two factors meet in some row. Greedy:
    the next row is the first with the most pairs that have not met. For arrays whose whole product is small."""
    every = {row: pairs(row) for row in product(*factors.values())}
    missing = set().union(*every.values())
    rows: list[Row] = []
    while missing:
        rows.append(max(every, key=lambda row: len(every[row] & missing)))
        missing -= every[rows[-1]]
    return rows
