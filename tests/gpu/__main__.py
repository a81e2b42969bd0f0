"""``python -m tests.gpu [SECTION...]``: measure, add to the results, write the page, print a table last."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.gpu import report


def main() -> int:
    """Parse the command line; returns 0 if every section came to its end and its bars, if measured, hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="Make the GPU report, or parts of it.")
    parser.add_argument("section", nargs="*", metavar="SECTION", help=f"{', '.join(report.SECTIONS)}; none: all")
    parser.add_argument("--budget", type=float, default=560, help="seconds for all of it on a GPU (560)")
    parser.add_argument("--folder", type=Path, default=report.FOLDER, help="where results and page are kept")
    parser.add_argument("--commit", help="what the page names where the tree is a copy without its history")
    arguments = parser.parse_args()
    if unknown := set(arguments.section) - set(report.SECTIONS):
        parser.error(f"no section is called {', '.join(sorted(unknown))}")
    names = [name for name in report.SECTIONS if name in arguments.section or not arguments.section]
    found = report.measure(names, arguments.budget, arguments.commit or report.head_commit())
    print(report.table(report.keep(found, arguments.folder)))
    good = all(section.passed if section.on_gpu else section.works for section in found)
    return 0 if good and len(found) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
