"""Compare runs: one table, one page, paired intervals where the runs had the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from testbed.metrics.comparison import Figure, differences, headline, run_names, shared_percentiles
from testbed.metrics.files import new_folder, write_json
from testbed.metrics.run import Run
from testbed.metrics.table import number, percent_more, signed

if TYPE_CHECKING:
    import pandas as pd

_MARKS = {"within noise": "~", "better": "+", "worse": "-"}


@dataclass(frozen=True)
class Comparison:
    """Runs and their figures beside those of ``runs[baseline]``."""

    runs: tuple[Run, ...]
    baseline: int
    figures: tuple[Figure, ...]
    """Figure by figure, and within each the runs in order."""

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.names)}; baseline {self.names[self.baseline]}>"

    @property
    def names(self) -> list[str]:
        """What the runs are called here, all different."""
        return run_names(self.runs)

    @property
    def paired(self) -> bool:
        """Whether every run had the same requests."""
        return all(figure.paired for figure in self.figures)

    def frame(self) -> pd.DataFrame:
        """One row a figure and run: value, interval, difference to the baseline, its interval, ratio, verdict."""
        import pandas as pd

        rows = []
        for figure in self.figures:
            low, high = figure.interval or (np.nan, np.nan)
            less, more = figure.difference_interval or (np.nan, np.nan)
            rows.append(
                {
                    "run": figure.run,
                    "metric": figure.metric,
                    "value": figure.value,
                    "low": low,
                    "high": high,
                    "difference": figure.difference,
                    "difference_low": less,
                    "difference_high": more,
                    "ratio": figure.ratio,
                    "paired": figure.paired,
                    "verdict": figure.verdict,
                }
            )
        return pd.DataFrame(rows)

    def table(self, metrics: Sequence[str] | None = None) -> str:
        """Text: a row a figure; a column a run, and beside each variant its difference to the baseline, in percent and
        in the figure's unit, with interval and mark.

        ``metrics``: keys of aggregates; default: the headline figures, with the percentiles that the runs ask for.
        """
        metrics = headline(shared_percentiles(self.runs)) if metrics is None else metrics
        by_metric: dict[str, list[Figure]] = {}
        for figure in self.figures:
            if figure.metric in metrics:
                by_metric.setdefault(figure.metric, []).append(figure)
        rows = [["", *(cell for name in self.names for cell in (name, "%", "difference"))]]
        for metric in sorted(by_metric, key=list(metrics).index):
            figures = by_metric[metric]
            if not all(np.isnan(figure.value) for figure in figures):
                cells = (cell for figure in figures for cell in _cells(figure))
                rows.append([metric, *cells])
        baseline = 2 + 3 * self.baseline  # its own difference, in percent and as it is
        rows = [row[:baseline] + row[baseline + 2 :] for row in rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        how = "paired: all runs had the same requests" if self.paired else "not all paired: requests differ"
        legend = f"latencies: + better, - worse, ~ difference within its 95 % interval; {how}"
        return "\n".join([line.rstrip() for line in [*lines, legend]])

    def save(self, folder: Path | str) -> Path:
        """Write ``compare.json`` and ``compare.csv`` (the frame); ``testbed.report.write_report(runs)`` makes the page.

        Raises:
            InputError: the folder holds something already.
        """
        folder = new_folder(Path(folder))
        content = {
            "runs": self.names,
            "baseline": self.names[self.baseline],
            "paired": self.paired,
            "digests": [run.decision_digest for run in self.runs],
            "figures": [{**asdict(figure), "verdict": figure.verdict} for figure in self.figures],
        }
        write_json(content, folder / "compare.json")
        self.frame().to_csv(folder / "compare.csv", index=False, lineterminator="\n")
        return folder


def compare(runs: Sequence[Run], baseline: int = 0) -> Comparison:
    """Compare ``runs`` with ``runs[baseline]``.

    Raises:
        InputError: ``baseline`` is none of the runs.
    """
    return Comparison(tuple(runs), baseline, tuple(differences(runs, baseline)))


def _cells(figure: Figure) -> tuple[str, str, str]:
    """A run's value, and its difference to the baseline in percent and in the figure's unit."""
    if not figure.difference:
        return number(figure.value), "", ""
    sign = _MARKS.get(figure.verdict, " ")
    low, high = figure.difference_interval or (np.nan, np.nan)
    bounds = "" if np.isnan(low) else f" [{signed(low)}, {signed(high)}]"
    return number(figure.value), percent_more(figure.ratio), f"{signed(figure.difference)}{bounds} {sign}"
