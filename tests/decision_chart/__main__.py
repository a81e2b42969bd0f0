"""``python -m tests.decision_chart``: simulate every cell and write ``reports/decision_chart`` (15 CPU minutes)."""

from __future__ import annotations

import argparse

import pandas as pd

from tests.decision_chart.cells import LAYOUTS, SEEDS, cells
from tests.decision_chart.page import write_page
from tests.decision_chart.table import read, rows_of, write


def main() -> None:
    """Parse the command line and make the chart."""
    parser = argparse.ArgumentParser(prog="python -m tests.decision_chart", description="Which loop wins where.")
    parser.add_argument(
        "--layout", action="append", choices=LAYOUTS, help="simulate this one again and keep the others; repeatable"
    )
    layouts = parser.parse_args().layout or list(LAYOUTS)
    table = read()
    rows = [table[~table["layout"].isin(layouts)]]
    for cell in cells():
        if cell.layout in layouts:
            rows.append(pd.DataFrame(rows_of(cell, SEEDS)))
            print(*cell, f"{rows[-1]['rate_per_s'].mean():.4g}", flush=True)
    write(pd.concat([each for each in rows if len(each)], ignore_index=True))
    write_page(read())


if __name__ == "__main__":
    main()
