from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.scenario.engines import engine_presets
from testbed.scenario.errors import InputError
from testbed.scenario.load import load_scenario, resolve, resolved_yaml
from testbed.scenario.paths import data_root
from testbed.scenario.schema import Scenario

ROOT = Path(__file__).parents[2]
SCENARIOS = sorted((ROOT / "scenarios").glob("*.yaml"))
MINIMAL: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "workload": {"arrivals": {"kind": "poisson", "rate_per_s": 4}, "lengths": {"prompt_tokens": 9, "output_tokens": 3}},
}


def with_engine(**engine: Any) -> dict[str, Any]:
    return {**MINIMAL, "engine": engine}


def test_everything_but_model_and_workload_has_a_default() -> None:
    scenario = load_scenario(MINIMAL).scenario
    assert (scenario.device, scenario.host, scenario.engine.loop, scenario.seed) == ("h100-sxm", "testbed", "auto", 0)
    assert scenario.percentiles == (50, 90, 95, 99)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_resolving_is_a_round_trip(path: Path) -> None:
    loaded = load_scenario(path)
    for scenario in [loaded.scenario, *loaded.variants.values()]:
        assert load_scenario(resolve(scenario)).scenario == scenario


def test_the_resolved_file_is_a_round_trip_and_shows_every_field(tmp_path: Path) -> None:
    scenario = load_scenario(with_engine(preset="sglang-0.5.1", loop="normal")).scenario
    file = tmp_path / "scenario.resolved.yaml"
    file.write_text(resolved_yaml(scenario), encoding="utf-8")
    again = load_scenario(file)
    assert again.scenario == scenario
    assert again.document.data.keys() == Scenario.model_fields.keys()
    assert again.document.data["engine"]["rules"]["can_stall"] is True


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_explains_itself_and_has_no_warning(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert load_scenario(path).warnings == ()


class TestPresets:
    def test_every_rule_and_the_loop_are_stated(self) -> None:
        for name in engine_presets():
            engine = load_scenario(with_engine(preset=name)).scenario.engine
            assert set(engine.rules.model_fields_set) == set(type(engine.rules).model_fields), name
            assert "loop" in engine.model_fields_set

    def test_sglang(self) -> None:
        engine = load_scenario(with_engine(preset="sglang-0.5.1")).scenario.engine
        assert (engine.batching, engine.policy, engine.retract_to) == ("prefill_first", "fcfs", "back")
        assert (engine.chunked_prefill_size, engine.loop) == (8192, "auto")
        assert engine.rules.ignore_eos_admission
        assert engine.rules.admission == "when_batch_shrinks"

    @pytest.mark.parametrize(
        ("device", "budget", "rows"),
        [("h100-sxm", 8192, 1024), ("a100-sxm", 2048, 256), ("rtx-4090", 2048, 256), ("h200-sxm", 8192, 1024)],
    )
    def test_vllm_chooses_by_device(self, device: str, budget: int, rows: int) -> None:
        engine = load_scenario(with_engine(preset="vllm-v1") | {"device": device}).scenario.engine
        assert (engine.chunked_prefill_size, engine.max_running_requests) == (budget, rows)
        assert (engine.batching, engine.loop, engine.page_size) == ("stall_free", "normal", 16)
        assert engine.rules.reserve == "none"

    def test_what_a_user_writes_wins(self) -> None:
        written = with_engine(preset="vllm-v1", page_size=32, rules={"reserve": "estimate"})
        engine = load_scenario(written).scenario.engine
        assert (engine.page_size, engine.rules.reserve, engine.rules.retract_victim) == (32, "estimate", "newest")


class TestOverrides:
    def test_values_are_yaml(self) -> None:
        overrides = ["engine.loop=overlap", "engine.kv_tokens=60e6", "engine.priority=true", "slo={ttft_ms: {p99: 5}}"]
        scenario = load_scenario(MINIMAL, overrides).scenario
        assert (scenario.engine.loop, scenario.engine.kv_tokens, scenario.engine.priority) == (
            "overlap",
            60_000_000,
            True,
        )
        assert scenario.slo.ttft_ms == {"p99": 5}

    def test_the_last_one_counts(self) -> None:
        assert load_scenario(MINIMAL, ["seed=1", "seed=2"]).scenario.seed == 2

    def test_a_source_that_is_a_dict_is_not_changed(self) -> None:
        source = with_engine(loop="normal")
        load_scenario(source, ["engine.loop=overlap"])
        assert source["engine"] == {"loop": "normal"}

    def test_an_error_names_the_option_not_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "s.yaml"
        file.write_text(resolved_yaml(load_scenario(MINIMAL).scenario), encoding="utf-8")
        with pytest.raises(InputError) as caught:
            load_scenario(file, ["engine.loop=norml"])
        assert caught.value.where == "--set engine.loop=norml"
        assert "did you mean 'normal'?" in caught.value.remedy


class TestVariants:
    def test_each_is_the_base_with_its_own_fields(self) -> None:
        compare = {"normal": {"engine.loop": "normal"}, "other host": {"host": "none", "engine.preset": "vllm-v1"}}
        loaded = load_scenario({**MINIMAL, "name": "x", "compare": compare})
        assert list(loaded.variants) == ["normal", "other host"]
        normal, other = loaded.variants.values()
        assert (normal.engine.loop, normal.host, normal.name) == ("normal", "testbed", "normal")
        assert (other.engine.batching, other.host) == ("stall_free", "none")
        assert normal.compare is None

    def test_without_compare_there_are_none(self) -> None:
        assert load_scenario(MINIMAL).variants == {}

    def test_an_error_in_a_variant_stands_at_the_variant(self) -> None:
        with pytest.raises(InputError, match=r"engine\.chunked_prefill_size"):
            load_scenario({**MINIMAL, "compare": {"a": {"engine.page_size": 100}}})


class TestFiles:
    def test_files_beside_the_scenario_are_found_from_anywhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "study"
        folder.mkdir()
        for name in ("requests.csv", "mine.py"):
            (folder / name).write_text("", encoding="utf-8")
        text = "model: m\nengine: {policy: mine.py:pick}\nworkload: {requests: {trace: requests.csv}}\n"
        (folder / "s.yaml").write_text(text, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        scenario = load_scenario("study/s.yaml").scenario
        assert scenario.workload.requests is not None
        assert scenario.workload.requests.trace == "study/requests.csv"
        assert scenario.engine.policy == "study/mine.py:pick"

    def test_names_of_presets_stay_names(self) -> None:
        loaded = load_scenario(ROOT / "scenarios" / "azure_conv.yaml").scenario
        assert loaded.workload.requests is not None
        assert (loaded.model, loaded.workload.requests.trace) == (
            "llama-3.1-8b",
            "azure_llm_2023_conv_first30min.csv",
        )


class TestWarnings:
    @pytest.mark.parametrize(
        ("engine", "words"),
        [
            ({"policy": "lpm", "prefix_cache": "none"}, "it is fcfs"),
            ({"policy": "dfs_weight", "prefix_cache": "chunk"}, "it is fcfs"),
            ({"kv_tokens": 1000, "page_size": 16}, "992"),
            ({"preset": "sglang-0.5.1", "priority": True}, "0.5.3"),
            ({"kv_tokens": 1000, "mem_fraction_static": 0.5}, "no effect"),
            ({"experts": {"skew": 1.0}}, "no effect with ep: 1"),
        ],
    )
    def test_said_but_not_refused(self, engine: dict[str, Any], words: str) -> None:
        (warning,) = load_scenario(with_engine(**engine)).warnings
        assert words in warning

    @pytest.mark.parametrize(
        ("fields", "words"),
        [({}, "with one replica"), ({"disaggregation": {"prefill": 2}}, "with disaggregation: pairs")],
    )
    def test_routing_where_nobody_is_chosen(self, fields: dict[str, Any], words: str) -> None:
        (warning,) = load_scenario({**MINIMAL, "routing": {"policy": "cache_aware"}, **fields}).warnings
        assert words in warning

    def test_silent_when_all_is_well(self) -> None:
        assert load_scenario(with_engine(policy="lpm", kv_tokens=1600, page_size=16)).warnings == ()
        replicas = {"engine": {"parallel": {"dp": 2}}, "routing": {"policy": "cache_aware"}}
        assert load_scenario({**MINIMAL, **replicas}).warnings == ()


class TestLocated:
    def test_a_field_path_gets_its_line(self, tmp_path: Path) -> None:
        file = tmp_path / "s.yaml"
        file.write_text("model: m\nengine:\n  loop: normal\nworkload: {requests: {trace: t.csv}}\n", encoding="utf-8")
        loaded = load_scenario(file)
        located = loaded.located(InputError("is bad", where="engine.loop", remedy="mend it"))
        assert (located.where, located.message) == (f"{file}:3:3", "engine.loop: is bad")
        by_value = loaded.located(InputError("is bad", where="t.csv", remedy="mend it"))
        assert by_value.where == f"{file}:4:23"
        untouched = InputError("is bad", where="other.csv:3:1")
        assert loaded.located(untouched) is untouched


def test_a_scenario_needs_no_data_or_says_so() -> None:
    """The first command of a new user must work without any download."""
    text = (ROOT / "scenarios" / "default.yaml").read_text(encoding="utf-8")
    assert "trace:" not in text
    for path in SCENARIOS:
        requests = load_scenario(path).scenario.workload.requests
        if requests is not None and Path(requests.trace).parent != path.parent:  # what lies beside it ships with it
            assert requests.trace in path.read_text(encoding="utf-8").split("\nname:")[0], (
                f"{path.name}: say what it needs"
            )
            root = data_root()
            assert root is None or (root / "traces" / requests.trace).is_file()


SOUND = (ROOT / "scenarios" / "batching.yaml").read_text(encoding="utf-8")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_an_input_error_or_none(data: st.DataObject) -> None:
    """Cut, doubled or overwritten anywhere, a scenario loads or is refused; nothing else ever escapes."""
    begin = data.draw(st.integers(0, len(SOUND)))
    end = data.draw(st.integers(begin, min(begin + 30, len(SOUND))))
    noise = st.one_of(
        st.text(max_size=8), st.sampled_from(["\n", ": ", "{", "[", "- ", "&a ", "*a", "!!int ", "? ", ".inf"])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("testbed.scenario.load.read_yaml", _parsed)
        try:
            load_scenario(SOUND[:begin] + data.draw(noise) + SOUND[end:])
        except InputError as error:
            assert all(one.where and one.message for one in error.errors)


def _parsed(text: str) -> Any:
    from testbed.scenario.yaml_reader import parse_yaml

    return parse_yaml(text, "s.yaml")
