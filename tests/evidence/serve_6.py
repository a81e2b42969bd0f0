"""Every row B, G, H and I of the test menu is a test that exists, or has its reason in docs/test_menu.md.

The page is read as it stands: each id of its tables, each test that it names, which must be a function or class of the
file that it names.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import TypeGuard

from tests.evidence.evidence import Evidence
from tests.server import page

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "test_menu.md"
LAST_ROW = {"B": 16, "G": 10, "H": 25, "I": 29}
"""Of each section of the catalogue."""
IDS = re.compile(r"\b([A-Z])(\d+)(?:-\1?(\d+))?\b")
TEST = re.compile(r"(?:(?P<file>[\w/]+\.py)::)?(?P<name>(?:test_|Test)\w+)")


def rows() -> list[list[str]]:
    """The cells of every row of the page's tables: (ids, what, tests) or (ids, reason)."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "id"]


def ids(cell: str) -> list[str]:
    """``B1, H5-H7`` as B1, H5, H6, H7."""
    found = []
    for section, first, last in IDS.findall(cell):
        found += [f"{section}{number}" for number in range(int(first), int(last or first) + 1)]
    return found


def named_tests(cells: list[list[str]]) -> list[tuple[str, str, str]]:
    """(ids, file, name) of each test that is named. A file without a folder is the one last named so, a test without a
    file is in the one before it."""
    found, places, file = [], dict[str, str](), ""
    for row in cells:
        for quoted in re.findall(r"`([^`]+)`", row[2]):
            if quoted.endswith(".py") and "/" in quoted:
                places[Path(quoted).name] = quoted
            match = TEST.fullmatch(quoted)
            if match is None:
                continue
            if match["file"]:
                file = match["file"] if "/" in match["file"] else places.get(match["file"], match["file"])
                places[Path(file).name] = file
            found.append((row[0], file, match["name"]))
    return found


@cache
def defined(file: str) -> frozenset[str]:
    """Functions and classes of a file, also those that are made by an assignment; none of one that is not there."""
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    made = {target.id for node in nodes if isinstance(node, ast.Assign) for target in node.targets if _is_name(target)}
    return frozenset({node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)} | made)


def _is_name(node: ast.expr) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name)


def check(smoke: bool) -> Evidence:
    """Read the page. The same at both sizes."""
    load = page.busy()
    cells = rows()
    tested = [row for row in cells if len(row) == 3]
    reasoned = [row for row in cells if len(row) == 2]
    tests = named_tests(tested)
    wanted = [f"{section}{number}" for section, last in LAST_ROW.items() for number in range(1, last + 1)]
    with_test = {one for cell, file, name in tests if name in defined(file) for one in ids(cell)}
    with_reason = {one for row in reasoned if row[1] for one in ids(row[0])}
    wrong = [f"{one} has neither test nor reason" for one in wanted if one not in with_test | with_reason]
    wrong += [f"{one} has a test and a reason why there is none" for one in wanted if one in with_test & with_reason]
    wrong += [f"{cell}: {file} has no {name}" for cell, file, name in tests if name not in defined(file)]
    count = len([one for one in wanted if one in with_test])
    reasons = [f"{row[0]}: {row[1]}" for row in reasoned if set(ids(row[0])) & set(wanted)]
    evidence = Evidence(
        figure=f"{count} of {len(wanted)} rows have tests, {len(with_reason & set(wanted))} a reason; "
        f"{len(tests)} tests are named; {len(wrong)} objections",
        bar="every row of B, G, H and I; every test exists",
        passed=not wrong,
        details=(*reasons, *wrong),
    )
    return evidence if smoke else page.keep("serve.6", evidence, seed="none", load=load)
