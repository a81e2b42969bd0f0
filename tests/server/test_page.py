"""The page of the server's evidence."""

from __future__ import annotations

from pathlib import Path

from tests.evidence.evidence import Evidence
from tests.server import page


def test_every_run_of_a_line_is_kept_and_the_last_one_counts(tmp_path: Path) -> None:
    for figure, passed in (("first figure", False), ("second figure", True)):
        evidence = Evidence(figure, "the bar", passed, ("a detail",))
        assert page.keep("serve.4", evidence, seed="7", load=1.25, folder=tmp_path) is evidence
    page.keep("serve.1", Evidence("another", "bar", False), seed="8", load=0.0, folder=tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.index("## Clients that people have: FAIL") < text.index("## Crowds: PASS")
    assert "| figure | second figure |" in text and "python -m tests.evidence serve.4" in text
    (row,) = [line for line in text.splitlines() if "first figure" in line]
    assert row.endswith("| 1.2 | first figure | FAIL |")
    assert text.count("Runs before:") == 1 and text.count("a detail") == 1
