"""Fits the tables in ``fitted/``: ``python -m testbed.workload.derive TRACE [-o FILE]``.

Arrivals are gamma gaps in *operational time* (the integral of a rate that is constant within each minute): the rates
are counts by minute, the coefficient of variation is that of the gaps in operational time. Lengths are a quantile
table of the prompts and, for bands of equally many prompts by length, quantile tables of the outputs, so that
long prompts get the outputs that go with long prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.workload.traces.known import KNOWN_TRACES
from testbed.workload.traces.reader import find_trace, read_trace
from testbed.workload.traces.rows import SECOND_NS

PROMPT_STEPS = 50
OUTPUT_STEPS = 25
TAIL = (0.99, 0.995, 0.998, 0.999, 0.9995)
"""Probabilities beside the even steps: a straight line over a long tail would move the mean."""
BANDS = 8
MINUTE_S = 60


def derive(path: Path) -> dict[str, Any]:
    """The table fitted to a trace, ready for JSON; the same file always gives the same table."""
    rows = list(read_trace(path))
    arrivals_s = np.array([row.arrival_ns for row in rows]) / SECOND_NS
    prompts = np.array([row.prompt_tokens for row in rows])
    outputs = np.array([row.output_tokens for row in rows])
    known = KNOWN_TRACES.get(path.name)
    return {
        "source": known.url if known else path.name,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "licence": known.licence if known else "unknown",
        "citation": known.citation if known else "",
        "derived_by": "python -m testbed.workload.derive",
        "rows": len(rows),
        "arrivals": _arrivals(arrivals_s),
        "lengths": _lengths(prompts, outputs),
    }


def _arrivals(arrivals_s: NDArray[np.float64]) -> dict[str, Any]:
    duration_s = arrivals_s[-1] - arrivals_s[0]
    minutes = max(int(np.ceil(duration_s / MINUTE_S)), 1)
    edges = np.arange(minutes + 1) * float(MINUTE_S)
    counts = np.histogram(arrivals_s, edges)[0]
    # A last minute that the trace does not fill counts as long as it lasted.
    lengths_s = np.minimum(edges[1:], duration_s) - edges[:-1]
    operational = np.interp(arrivals_s, edges, np.concatenate([[0.0], np.cumsum(counts)]))
    gaps = np.diff(operational)
    return {
        "minute_rates_per_s": [round(float(rate), 4) for rate in counts / lengths_s],
        "gap_cv": round(float(gaps.std() / gaps.mean()), 4),
    }


def _lengths(prompts: NDArray[np.int64], outputs: NDArray[np.int64]) -> dict[str, Any]:
    order = np.argsort(prompts, kind="stable")
    bands = np.array_split(outputs[order], BANDS)
    prompt_grid, output_grid = _probabilities(PROMPT_STEPS), _probabilities(OUTPUT_STEPS)
    return {
        "prompt_probabilities": prompt_grid,
        "prompt_tokens": _points(prompts, prompt_grid),
        "output_probabilities": output_grid,
        "output_tokens_by_prompt_band": [_points(band, output_grid) for band in bands],
    }


def _probabilities(steps: int) -> list[float]:
    return sorted({*np.linspace(0, 1, steps + 1).round(4).tolist(), *TAIL})


def _points(lengths: NDArray[np.int64], probabilities: list[float]) -> list[float]:
    return [round(float(point), 1) for point in np.quantile(lengths, probabilities)]


def main() -> None:
    """Write the table of a trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(derive(find_trace(arguments.trace, Path())), indent=1) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
