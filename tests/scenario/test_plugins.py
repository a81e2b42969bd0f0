from __future__ import annotations

from pathlib import Path

import pytest

from testbed.scenario.errors import InputError
from testbed.scenario.plugins import is_plugin, load_plugin


def test_a_file_beside_the_scenario(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass Policy:\n    x: int = 3\n"
    )
    policy = load_plugin("mine.py:Policy", tmp_path)
    assert policy().x == 3
    assert load_plugin("mine.py:Policy", tmp_path) is policy


def test_a_module_by_name() -> None:
    assert load_plugin("math:floor")(1.5) == 1


def test_a_package_beside_the_scenario(tmp_path: Path) -> None:
    (tmp_path / "plugin_package_under_test").mkdir()
    (tmp_path / "plugin_package_under_test" / "loops.py").write_text("loop = 'found'\n")
    assert load_plugin("plugin_package_under_test.loops:loop", tmp_path) == "found"


def test_what_is_a_plugin() -> None:
    assert is_plugin("a.b:c") and is_plugin("dir/a.py:c") and not is_plugin("overlap")


@pytest.mark.parametrize(
    ("code", "line"), [("x = 1\n\ny = x / 0\n", 3), ("def f():\n    import nowhere_at_all\n\nf()\n", 2), ("x = [\n", 1)]
)
def test_a_failing_import_names_the_users_line(tmp_path: Path, code: str, line: int) -> None:
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(InputError) as caught:
        load_plugin("broken.py:x", tmp_path, where="engine.loop")
    assert f"broken.py:{line}" in caught.value.message
    assert caught.value.where == "engine.loop"


@pytest.mark.parametrize("name", ["overlap", "a:", ":b", "a:b-c", "nowhere_at_all:x", "math.nothing:x", "math:flor"])
def test_what_cannot_be_found_is_an_input_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_plugin(name, tmp_path)
    assert caught.value.remedy


def test_the_import_path_is_left_as_it_was(tmp_path: Path) -> None:
    import sys

    before = list(sys.path)
    with pytest.raises(InputError):
        load_plugin("nowhere_at_all:x", tmp_path)
    assert sys.path == before
