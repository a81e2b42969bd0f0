"""Every example of the documentation runs, and every kind that exists has one."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from testbed.scenario.workload import Arrivals, Distribution, Lengths

from .world import build

TEXT = (Path(__file__).parents[2] / "docs" / "workloads.md").read_text()
EXAMPLES = [YAML(typ="safe").load(block)["workload"] for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run(example: dict[str, Any]) -> None:
    requests = list(islice(build(example).start(), 20))
    assert len(requests) >= 10


@pytest.mark.parametrize("union", [Arrivals, Lengths, Distribution])
def test_every_kind_is_documented(union: Any) -> None:
    for model in get_args(get_args(union)[0]):
        (kind,) = get_args(model.model_fields["kind"].annotation)
        assert re.search(rf"kind: {kind}\b|`{kind}`", TEXT), kind
