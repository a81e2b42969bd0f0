"""Engine presets: how SGLang and vLLM are set up, as values for the fields of ``engine``.

A preset is a YAML file: ``engine`` holds values, ``devices`` holds further values by device name (shell patterns, the
first that fits counts), ``sources`` says where they are from. What a user writes himself wins over both.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from testbed.scenario.yaml_reader import read_yaml

_FOLDER = Path(__file__).parent / "presets" / "engines"


def engine_presets() -> dict[str, str]:
    """Names of the engine presets and one line on each."""
    return {path.stem: str(read_yaml(path).data["summary"]) for path in sorted(_FOLDER.glob("*.yaml"))}


def with_preset(engine: Mapping[str, Any], device: object) -> dict[str, Any]:
    """``engine`` as written, completed by the preset it names; unchanged when it names none that exists."""
    path = _FOLDER / f"{engine.get('preset', 'none')}.yaml"
    if not path.is_file():
        return dict(engine)
    preset = read_yaml(path).data
    values: dict[str, Any] = deepcopy(preset["engine"])
    for pattern, more in preset.get("devices", {}).items():
        if isinstance(device, str) and fnmatch(device, pattern):
            values |= more
            break
    return _merged(values, engine)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result
