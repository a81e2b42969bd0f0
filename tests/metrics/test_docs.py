"""``docs/metrics.md`` names every column and code, and its example runs."""

import re
from pathlib import Path

import pytest

from testbed.batch import ForwardMode
from testbed.metrics.records import CLIENT_COLUMNS, REQUEST_COLUMNS, SPAN_COLUMNS, STEP_COLUMNS
from testbed.ports import Stage

TEXT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def test_the_example_reads_a_run_folder(run, tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    run.save(tmp_path / "runs" / "my-scenario-1")
    exec(compile(example, "docs/metrics.md", "exec"), {})
    printed = capsys.readouterr().out
    assert str(run.aggregates()["p99_ttft_ms"]) in printed and "decode" in printed and "receive" in printed


@pytest.mark.parametrize("columns", [REQUEST_COLUMNS, CLIENT_COLUMNS, STEP_COLUMNS, SPAN_COLUMNS])
def test_every_column_is_documented(columns):
    assert all(f"| `{name}` | " in TEXT for name in columns)


def test_every_code_is_documented():
    assert [stage.value for stage in Stage] == list(range(9))
    assert ", ".join(stage.name.lower() for stage in Stage) in TEXT
    assert [(mode.value, mode.name.lower()) for mode in ForwardMode] == [(1, "extend"), (2, "decode"), (3, "mixed")]
