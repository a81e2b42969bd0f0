"""Published points: the simulator's TPOT and TTFT against what others measured on H100, H200 and RTX PRO 6000.

Runs ``experiments/06_published_points``: per engine the mean absolute error over the judged part, of which nothing was
used to fit, and at full size the errors of the means of the run by request. The details name the worst points. A small
run takes four judged points from the committed table, with the committed constants.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from tests.evidence.evidence import Evidence

ROOT = Path(__file__).parents[2]
WORST = 5


def check(smoke: bool) -> Evidence:
    """Predict the points and hold every error to its bar."""
    path = ROOT / "experiments" / "06_published_points" / "analysis.py"
    study = SimpleNamespace(**runpy.run_path(str(path), run_name="study"))
    points, figures = study.study(smoke)
    bars: dict[str, float] = study.BARS
    found = {
        (engine, metric): figures[f"{engine}_judged_predicted_{metric}_absolute"]
        for engine in study.SCENARIOS
        for metric in bars
    }
    if not smoke:
        found |= {("run by request", metric): abs(figures[f"run_mean_{metric}_error"]) for metric in bars}
    judged = points[points["part"] == "judged"]
    return Evidence(
        figure="; ".join(f"{who} {metric.upper()} {error:.1f} %" for (who, metric), error in found.items())
        + f" (mean absolute, {len(judged)} judged points)",
        bar="; ".join(f"{metric.upper()} {bar:g} %" for metric, bar in bars.items()),
        passed=all(error <= bars[metric] for (_, metric), error in found.items()),
        details=tuple(line for metric in bars for line in worst(judged, metric)),
    )


def worst(judged: pd.DataFrame, metric: str) -> list[str]:
    """The points whose error is largest, in words."""
    column = f"predicted_{metric}_error"
    order = judged[column].abs().sort_values(ascending=False).index[:WORST]
    return [
        f"worst {metric.upper()}: {row.engine} {row.isl} + {row.osl} tokens, {row.concurrency} clients: "
        f"{getattr(row, column):+.1f} % ({getattr(row, f'{metric}_ms'):.4g} ms measured)"
        for row in judged.loc[order].itertuples()
    ]
