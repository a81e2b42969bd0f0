"""Replay of whole runs, from memory and from folders that somebody sent: sound, altered, hostile."""

from __future__ import annotations

import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import testbed
from testbed import Run, simulate
from testbed.cli.main import MISSED, OK, WRONG_INPUT, invoke
from testbed.metrics import files
from testbed.metrics.journal import HEADER, Journal
from testbed.metrics.records import REQUEST_COLUMNS
from testbed.runtime.replay import Replayed
from testbed.scenario.errors import InputError
from testbed.scenario.load import load_scenario
from testbed.scheduler.decisions import read_decisions
from testbed.study.replay import MOST_REQUESTS, replay
from tests.metrics.test_journal import BIG_BYTES
from tests.study.alterations import REFUSED, Alteration, Subject, alterations, by_priority, subject
from tests.study.forging import edit_json, flip, reseal
from tests.study.recorded import CASES, OWN, Case, drawn, everything, happened, interrupted, scenario, simulated

QUIET = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, *HealthCheck],
)
Patch = pytest.MonkeyPatch

# -- sound runs -----------------------------------------------------------------------------

UNUSUAL = {"retraction", "abort", "stop", "chunking", "cache", "eviction", "leap", "log-probabilities", "interruption"}
seen: dict[str, set[str]] = {}
"""What happened in the runs that were replayed."""


def is_the_same(found: Replayed, recorded: Run) -> None:
    """Compared here once more, without the replay's own verdict."""
    assert found.divergence is None, found.last.explain()
    assert found.records.decisions == recorded.records.decisions
    assert found.steps == found.recorded_steps == sum(1 for _ in read_decisions(recorded.records.decisions))
    for name in REQUEST_COLUMNS:
        assert list(found.records.requests[name]) == list(recorded.records.requests[name]), name
    assert found.records.token_times_ns.tolist() == recorded.records.token_times_ns.tolist()
    assert found.equal and found.verdict().startswith(f"{found.steps:,} steps, every decision is the recorded one (")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_step_of_a_recorded_run_is_equal(case: Case, tmp_path: Path, monkeypatch: Patch) -> None:
    """In memory, and from a folder that lies somewhere else; what the scenario names is not there any more."""
    recorded = case.make()
    seen[case.name] = happened(recorded)
    is_the_same(replay(recorded), recorded)
    folder = recorded.save(tmp_path / "run", parquet=len(seen) % 2 == 0)
    sent = folder.rename(tmp_path / "sent")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    is_the_same(replay(sent), Run.load(sent))
    assert list(Path().iterdir()) == []


def test_enough_happened() -> None:
    assert len(CASES) >= 20
    if len(seen) == len(CASES):  # not where single cases were asked for
        assert set().union(*seen.values()) >= UNUSUAL


def test_the_files_of_a_scenario_are_not_needed(tmp_path: Path, monkeypatch: Patch) -> None:
    """A trace, a model and a device of its own: the run is replayed where nobody has them."""
    from testbed.engine.models.create import Sizes, create_model

    place = tmp_path / "theirs"
    place.mkdir()
    create_model("llama-3.1-8b", place / "tiny", Sizes(layers=1, hidden=32))
    for file in (Path(testbed.__file__).parent / "costs" / "devices").glob("h100-sxm.*"):
        shutil.copy(file, place)
    rows = "\n".join(f"{0.01 * i},{30 + i},{5 + i}" for i in range(20))
    (place / "trace.csv").write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}\n", encoding="utf-8")
    (place / "one.yaml").write_text(
        "model: tiny\ndevice: h100-sxm.yaml\nengine: {kv_tokens: 2000}\nworkload: {requests: {trace: trace.csv}}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(place)
    folder = simulate(load_scenario("one.yaml").scenario).save(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(place)
    is_the_same(replay(folder), Run.load(folder))


# -- somebody's own code -----------------------------------------------------------------------

OWN_PARTS = {"loop": f"{OWN}:double_check", "batching": f"{OWN}:Alternate", "policy": f"{OWN}:newest_first"}


@pytest.mark.parametrize("field", OWN_PARTS)
def test_own_code_is_imported_only_when_asked_for(field: str, tmp_path: Path) -> None:
    fields = {field: OWN_PARTS[field]}
    recorded = simulated({key: value for key, value in fields.items() if key != "loop"}, fields.get("loop", "overlap"))
    folder = recorded.save(tmp_path / "run")
    with pytest.raises(InputError, match="code of its own") as told:
        replay(folder)
    assert told.value.where == f"engine.{field}" and "--own-code" in told.value.remedy
    is_the_same(replay(folder, own_code=True), recorded)


def test_a_fault_of_own_code_is_told_as_such(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    sound = "from testbed.loops.normal import event_loop_normal as mine\n"
    file.write_text(sound, encoding="utf-8")
    recorded = simulated({}, f"{file}:mine")
    broken = tmp_path / "broken.py"
    broken.write_text("async def mine(loop):\n    loop.nonsense()\n", encoding="utf-8")
    setting = msgspec.structs.replace(recorded.records.journal.setting, loop=f"{broken}:mine")  # type: ignore[union-attr]
    recorded.records.journal.setting = setting  # type: ignore[union-attr]
    with pytest.raises(InputError, match="no attribute 'nonsense'"):
        replay(recorded, own_code=True)


@pytest.mark.parametrize("where", ["journal", "scenario"])
def test_a_run_cannot_name_code_to_be_imported(where: str, tmp_path: Path) -> None:
    trap, mark = tmp_path / "trap.py", tmp_path / "it ran"
    trap.write_text(f"open({str(mark)!r}, 'w')\nasync def loop(loop): ...\n", encoding="utf-8")
    recorded = simulated({}, "normal")
    journal = recorded.records.journal
    assert journal is not None and journal.setting is not None
    if where == "journal":
        journal.setting = msgspec.structs.replace(journal.setting, loop=f"{trap}:loop")
    else:
        recorded.scenario["engine"]["loop"] = f"{trap}:loop"
        recorded.scenario["cost_model"] = f"{trap}:loop"
    folder = recorded.save(tmp_path / "run")
    if where == "journal":
        with pytest.raises(InputError, match=r"code of its own: .*trap.py"):
            replay(folder)
    else:  # the loop that ran is the journal's; nobody prices anything
        assert replay(folder).equal
    assert not mark.exists()


# -- altered bytes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rich() -> Run:
    """A run in which much happens: drawn tokens, stops, log-probabilities, retraction."""
    return drawn("overlap")


@pytest.fixture(scope="module", params=["parquet", "csv"])
def small(rich: Run, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return rich.save(folder, parquet=request.param == "parquet")


@settings(QUIET, max_examples=300)
@given(st.data())
def test_a_single_other_byte_is_refused_by_the_files_name(small: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(file.name for file in small.iterdir())))
    whole = (small / name).read_bytes()
    try:
        flip(small / name, data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255)))
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            replay(small)
    finally:
        (small / name).write_bytes(whole)
    assert len(whole) > 0


@pytest.mark.parametrize("how", ["cut", "longer", "empty", "missing", "a folder"])
def test_a_file_that_is_not_whole_is_refused_by_its_name(small: Path, tmp_path: Path, how: str) -> None:
    for name in sorted(file.name for file in small.iterdir()):
        folder = shutil.copytree(small, tmp_path / f"{name} {how}")
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        if how == "a folder":
            (folder / name).mkdir()
        elif how != "missing":
            (folder / name).write_bytes({"cut": whole[:-1], "longer": whole + b"\n", "empty": b""}[how])
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            replay(folder)


# -- altered journals with digests made anew ---------------------------------------------------------


@pytest.fixture(scope="module", params=["normal", "overlap"])
def altered_run(request: pytest.FixtureRequest) -> Subject:
    return subject(request.param)


def objection(found: Replayed, wanted: Alteration) -> str:
    """What is wrong with a verdict; '' when nothing is."""
    step = None if found.divergence is None else found.divergence.step
    if step != wanted.step:
        return f"{wanted.name}: step {step}, not {wanted.step}; {found.last.reason}"
    if step is None and bool(found.differing) != wanted.records:
        return f"{wanted.name}: records that differ: {found.differing}"
    return "" if found.equal == (step is None and not wanted.records) else f"{wanted.name}: {found.verdict()}"


def test_alterations_are_reported_at_the_right_step(altered_run: Subject) -> None:
    is_the_same(replay(altered_run.run), altered_run.run)
    wrong, kinds = [], {"refused": 0, "at a step": 0, "in the records": 0, "without effect": 0}
    for alteration in alterations(altered_run):
        if isinstance(alteration.journal, bytes):
            assert alteration.step == REFUSED
            with pytest.raises(ValueError):
                Journal.from_bytes(alteration.journal)
            kinds["refused"] += 1
            continue
        wrong.append(objection(replay(altered_run.altered(alteration.journal)), alteration))
        named = "in the records" if alteration.records else "without effect"
        kinds[named if alteration.step is None else "at a step"] += 1
    assert not any(wrong), "\n".join(filter(None, wrong))
    assert kinds["at a step"] > 100 and min(kinds.values()) >= 5, kinds


def test_altered_folders_are_refused_or_reported_too(altered_run: Subject, tmp_path: Path) -> None:
    folder = altered_run.run.save(tmp_path / "run")
    for alteration in list(alterations(altered_run))[::9]:
        journal = alteration.journal
        (folder / "journal.bin").write_bytes(journal if isinstance(journal, bytes) else journal.to_bytes())
        with pytest.raises(InputError, match=r"journal\.bin: the file is damaged"):
            replay(folder)
        reseal(folder)
        if alteration.step == REFUSED:
            with pytest.raises(InputError, match=r"journal\.bin: the file is damaged"):
                replay(folder)
        else:
            assert objection(replay(folder), alteration) == ""


@pytest.mark.parametrize("priority", [0, 2, 3, 7, 10])
@pytest.mark.parametrize("changed", range(8))
def test_another_priority_is_reported_where_the_order_changes(changed: int, priority: int) -> None:
    forged, step = by_priority(changed, priority)
    found = replay(forged)
    assert (None if found.divergence is None else found.divergence.step) == step


def test_altered_records_are_named_although_every_decision_is_equal() -> None:
    recorded = everything(loop="overlap")
    finish = np.asarray(recorded.records.requests["finish_ns"]).copy()
    finish[3] += 1
    forged = replace(recorded.records, requests={**recorded.records.requests, "finish_ns": finish})
    found = replay(Run(recorded.scenario, forged))
    assert found.divergence is None and found.differing == ("requests.finish_ns",) and not found.equal
    assert found.verdict().endswith("but the RECORDS DIFFER: requests.finish_ns")


def test_an_altered_decision_is_reported_at_its_step(tmp_path: Path) -> None:
    """Of the log itself: where its bytes first differ, and what is missing at its end."""
    recorded = everything(loop="normal")
    log = recorded.records.decisions
    ends = [6]
    for decision in read_decisions(log):
        parts = len(decision.prefills) * 3 + len(decision.retracted) + len(decision.pages)
        rows = 0 if log[ends[-1] + 1] & 1 else len(decision.decodes)
        ends.append(ends[-1] + 16 + 4 * (parts + rows))
    assert ends[-1] == len(log)
    for step in range(0, len(ends) - 1, 7):
        changed = bytearray(log)
        changed[ends[step + 1] - 1] ^= 64
        found = replay(Run(recorded.scenario, replace(recorded.records, decisions=bytes(changed))))
        assert found.divergence is not None and found.divergence.step == step
        found = replay(Run(recorded.scenario, replace(recorded.records, decisions=log[: ends[step]])))
        assert found.divergence is not None and found.divergence.step == step
        assert found.divergence.recorded is None and found.divergence.reason == "the run launches no more"
    longer = replay(Run(recorded.scenario, replace(recorded.records, decisions=log + log[ends[-2] :])))
    assert longer.divergence is not None and longer.divergence.step == len(ends) - 1
    assert longer.divergence.reason == "the replay launches no more" and longer.divergence.replayed is None
    with pytest.raises(InputError, match="no log of this version"):
        replay(Run(recorded.scenario, replace(recorded.records, decisions=b"TBDL\x02\x00" + log[6:])))


# -- hostile folders ------------------------------------------------------------------------------


def refused_or_replayed(source: Run | Path) -> Replayed | None:
    """The only two ways to answer; never much memory."""
    tracemalloc.start()
    try:
        return replay(source)
    except InputError as error:
        assert str(error)
        return None
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < BIG_BYTES, f"{most:,} bytes"


def test_any_journal_that_can_be_read_is_replayed_or_refused(rich: Run) -> None:
    """Places in the document and in its messages become something else, of any type."""
    draw = random.Random(8)
    read = diverged = 0
    assert rich.records.journal is not None
    whole = rich.records.journal.to_bytes()
    for _ in range(600):
        document = msgspec.msgpack.decode(whole[len(HEADER) :])
        if draw.random() < 0.3:
            place = draw.choice(document["arrivals"])
            message = msgspec.msgpack.decode(place[1])
            _spoil(message, draw)
            place[1] = msgspec.msgpack.encode(message)
        for _ in range(draw.randint(1, 3)):
            _spoil(document, draw)
        try:
            journal = Journal.from_bytes(HEADER + msgspec.msgpack.encode(document))
        except ValueError:
            continue
        found = refused_or_replayed(Run(rich.scenario, replace(rich.records, journal=journal)))
        read += 1
        diverged += found is not None and found.divergence is not None
        assert found is None or found.last.explain()
    assert read > 50 and diverged > 20


ANYTHING = (None, True, -1, 2**63, 2**64 - 1, 0.5, "x", b"", b"12345678", [], {}, [1], {"a": 1}, [[[]]])
TIMES = (0, 1, 5, 2**61, 2**62 - 1, 2**63 - 1)


def _spoil(document: Any, draw: random.Random) -> None:
    """Change one place, most often to a value of its own type."""
    node, key = document, ""
    while True:
        key = draw.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or draw.random() < 0.15:
            break
        node = node[key]
    value = node[key]
    if isinstance(value, bool):
        node[key] = not value
    elif isinstance(value, int):
        node[key] = draw.choice([draw.randrange(40), draw.randrange(2**63)])
    elif isinstance(value, bytes) and len(value) >= 8 and draw.random() < 0.5:
        at = 8 * draw.randrange(len(value) // 8)
        node[key] = value[:at] + draw.choice(TIMES).to_bytes(8, "little") + value[at + 8 :]
    elif isinstance(value, bytes) and value:
        at = draw.randrange(len(value))
        node[key] = value[:at] + bytes([draw.randrange(256)]) + value[at + 1 :]
    elif isinstance(value, list) and value:
        at = draw.randrange(len(value))
        node[key] = draw.choice([value[:at] + value[at + 1 :], value + value[at:], value[::-1]])
    else:
        node[key] = draw.choice(ANYTHING)


def test_a_claim_of_much_memory_is_refused(tmp_path: Path) -> None:
    def claim(run: Run, **fields: int) -> Run:
        assert run.records.journal is not None and run.records.journal.setting is not None
        run.records.journal.setting = msgspec.structs.replace(run.records.journal.setting, **fields)
        return run

    for fields in ({"kv_tokens": 2**40}, {"kv_tokens": 2**62}):
        assert refused_or_replayed(claim(everything(), **fields)) is None
    many = everything()
    many.scenario["engine"]["max_running_requests"] = MOST_REQUESTS + 1
    assert refused_or_replayed(many) is None
    assert refused_or_replayed(claim(everything(), context_length=2**62)) is not None  # bounded by the pool


HOSTILE_JSON: list[Callable[[dict[str, Any]], object]] = [
    lambda content: content.clear(),
    lambda content: content.update(format=3),
    lambda content: content.update(format="2"),
    lambda content: content.update(files=[]),
    lambda content: content.update(files={"journal.bin": 5}),
    lambda content: content.update(files={"/dev/zero": "0" * 64}),
    lambda content: content.update(files={"../../etc/passwd": "0" * 64}),
    lambda content: content.update(files={"..": "0" * 64}),
    lambda content: content.update(counters=["steps"]),
    lambda content: content.update(counters={"steps": "many"}),
    lambda content: content.update(meta=None),
    lambda content: content.update(provenance=7),
    lambda content: content.pop("files"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE_JSON)))
def test_hostile_run_json(small: Path, tmp_path: Path, number: int) -> None:
    folder = edit_json(shutil.copytree(small, tmp_path / "run"), HOSTILE_JSON[number])
    with pytest.raises(InputError, match=r"run\.json"):
        replay(folder)


DEEP = 100_000
HOSTILE_TEXT = [
    ("run.json", b"[" * DEEP),
    ("run.json", b'{"a":' * DEEP),
    ("run.json", b'{"format": ' + b"9" * 5000 + b"}"),
    ("run.json", b"[]"),
    ("run.json", b"\xff\xfe"),
    ("scenario.resolved.yaml", b"[" * 1000),
    ("scenario.resolved.yaml", b"- " * 1000),
    ("scenario.resolved.yaml", b"[]"),
    ("scenario.resolved.yaml", b"a: &a [*a]"),
    ("scenario.resolved.yaml", b"engine: !!python/object/apply:os.system [ls]"),
    ("scenario.resolved.yaml", b"\x00"),
    ("scenario.resolved.yaml", b"\xff\xfe"),
    ("scenario.resolved.yaml", b"seed: " + b"9" * 5000),
    ("scenario.resolved.yaml", b"{[1]: 2, ? {a: b} : c}"),
    (
        "scenario.resolved.yaml",
        b"\n".join(
            [b"a0: &a0 [0]", *(b"a%d: &a%d [%s]" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 20))]
        ),
    ),
    ("scenario.resolved.yaml", b"a: &a {b: 1}\nengine:\n  <<: [*a, *a]\n"),
    ("scenario.resolved.yaml", b"engine: {max_running_requests: 99999999999999999999999}"),
    ("decisions.bin", b""),
    ("decisions.bin", b"TBDL\x01\x00" + b"\xff" * 50),
    ("decisions.sha256", b""),
    ("decisions.sha256", b"\xff"),
    ("journal.bin", b""),
    ("journal.bin", HEADER + b"\x91" * DEEP),
    ("run.sha256", b"\xff"),
    ("run.sha256", b""),
]


@pytest.mark.parametrize("number", range(len(HOSTILE_TEXT)))
def test_hostile_text(small: Path, tmp_path: Path, number: int) -> None:
    name, content = HOSTILE_TEXT[number]
    folder = shutil.copytree(small, tmp_path / "run")
    (folder / name).write_bytes(content)
    if name not in ("run.json", "run.sha256"):
        reseal(folder)
    elif name == "run.json":
        files.seal(folder)
    assert refused_or_replayed(folder) is None


@settings(QUIET, max_examples=60)
@given(st.data())
def test_noise_in_any_file(small: Path, data: st.DataObject) -> None:
    """Bytes changed in the middle, digests made anew: the readers themselves must stand it."""
    folder = small.parent / "noise"
    if not folder.exists():
        shutil.copytree(small, folder)
    name = data.draw(
        st.sampled_from(sorted(f.name for f in small.iterdir() if f.name not in ("run.json", "run.sha256")))
    )
    whole = (folder / name).read_bytes()
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        (folder / name).write_bytes(bytes(changed))
        reseal(folder)
        refused_or_replayed(folder)
    finally:
        (folder / name).write_bytes(whole)


def columns(folder: Path, name: str) -> dict[str, Any]:
    return dict(zip((table := pq.read_table(folder / name)).column_names, table.columns, strict=True))


HOSTILE_COLUMNS: list[tuple[str, str, Callable[[int], Any]]] = [
    ("steps", "launch_ns", lambda rows: pa.array(["x"] * rows)),
    ("steps", "launch_ns", lambda rows: pa.array([None] * rows, pa.int64())),
    ("steps", "launch_ns", lambda rows: pa.array([0.5] * rows)),
    ("steps", "launch_ns", lambda rows: pa.array([[1]] * rows)),
    ("steps", "launch_ns", lambda rows: pa.array([2**64 - 1] * rows, pa.uint64())),
    ("steps", "new_token_ratio", lambda rows: pa.array([1] * rows)),
    ("requests", "id", lambda rows: pa.array([None] * rows, pa.string())),
    ("requests", "id", lambda rows: pa.array([b"\xff"] * rows, pa.binary())),
    ("requests", "session", lambda rows: pa.array(range(rows))),
    ("tokens", "request", lambda rows: pa.array([10**12] * rows)),
    ("tokens", "request", lambda rows: pa.array([-5] * rows)),
]


@pytest.mark.parametrize("number", range(len(HOSTILE_COLUMNS)))
def test_hostile_columns(rich: Run, tmp_path: Path, number: int) -> None:
    name, column, make = HOSTILE_COLUMNS[number]
    folder = rich.save(tmp_path / "run", parquet=True)
    table = columns(folder, f"{name}.parquet")
    pq.write_table(pa.table({**table, column: make(len(table[column]))}), folder / f"{name}.parquet")
    with pytest.raises(InputError, match=name):
        replay(reseal(folder))


def test_a_table_that_unfolds_is_refused(rich: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    """The bound is lowered to what an ordinary writer reaches."""
    folder = rich.save(tmp_path / "run", parquet=True)
    zeros = np.zeros(2_000_000, np.int64)
    pq.write_table(pa.table({"request": zeros, "time_ns": zeros}), folder / "tokens.parquet", compression="zstd")
    monkeypatch.setattr(files, "_ROWS_A_BYTE", 10)
    with pytest.raises(InputError, match=r"tokens\.parquet: the file is damaged: it claims 2,000,000 rows"):
        replay(reseal(folder))


def test_hostile_csv(rich: Run, tmp_path: Path) -> None:
    for number, cell in enumerate(["9" * 30, "1.5", "x", "1" * 200_000, '"', "9" * 6000, "\x00"]):
        folder = rich.save(tmp_path / f"run {number}", parquet=False)
        head, first, *rest = (folder / "steps.csv").read_text(encoding="utf-8").split("\n")
        spoilt = "\n".join([head, cell + first[first.index(",") :], *rest])
        (folder / "steps.csv").write_text(spoilt, encoding="utf-8")
        with pytest.raises(InputError, match=r"steps\.csv"):
            replay(reseal(folder))


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_what_has_no_end_is_not_read(small: Path, tmp_path: Path, kind: str) -> None:
    for name in sorted(file.name for file in small.iterdir()):
        folder = shutil.copytree(small, tmp_path / name)
        (folder / name).unlink()
        if kind == "a pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).symlink_to("/dev/zero")
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            replay(folder)


# -- the command ------------------------------------------------------------------------------


def test_the_command_says_what_it_found(tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for loop in ("normal", "overlap"):
        everything(loop=loop).save(tmp_path / "runs" / loop)
    assert invoke(["replay", "runs"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["runs/normal", "runs/overlap"]
    assert all("every decision is the recorded one" in line for line in lines)
    assert invoke(["replay", "runs/normal", "--until-step", "5"]) == OK
    shown = capsys.readouterr().out
    assert shown.startswith("runs/normal: the first 5 of ") and "\nstep 4, at " in shown and "<-" not in shown
    journal = Journal.from_bytes((tmp_path / "runs/normal/journal.bin").read_bytes())
    journal.arrivals.pop(2)
    (tmp_path / "runs/normal/journal.bin").write_bytes(journal.to_bytes())
    assert invoke(["replay", "runs/normal"]) == WRONG_INPUT
    assert "error: runs/normal/journal.bin: the file is damaged" in capsys.readouterr().err
    reseal(tmp_path / "runs/normal")
    assert invoke(["replay", "runs"]) == MISSED
    shown = capsys.readouterr().out
    assert shown.startswith("runs/normal: DIVERGES at step ") and "  <-" in shown and "\nruns/overlap: " in shown


def test_a_run_without_a_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = everything()
    recorded.records.journal = None
    recorded.save(tmp_path / "old")
    assert invoke(["replay", str(tmp_path / "old")]) == WRONG_INPUT
    printed = capsys.readouterr().err
    assert "the run has no journal to replay" in printed and "run the scenario again" in printed


def test_a_scenario_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = everything()
    recorded.scenario["engine"]["quantum"] = True
    recorded.save(tmp_path / "new")
    assert invoke(["replay", str(tmp_path / "new")]) == WRONG_INPUT
    printed = capsys.readouterr().err
    assert "engine.quantum" in printed and "replay it with the version that made it" in printed


@pytest.mark.parametrize("loop", ["normal", "overlap_thread"])
def test_a_run_that_was_interrupted_within_a_step(loop: str) -> None:
    """Nobody has waited for the end of that minute: the step has no result, and the replay ends there as well."""
    recorded = interrupted(loop, prefill_ns=60 * 10**9, after=0)
    found = replay(recorded)
    is_the_same(found, recorded)
    assert found.steps > 0 == len(recorded.records.steps["step"])


def test_own_code_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate(scenario({"policy": OWN_PARTS["policy"]})).save(tmp_path / "own")
    assert invoke(["replay", str(tmp_path / "own")]) == WRONG_INPUT
    assert "error: engine.policy: the run was made with code of its own" in capsys.readouterr().err
    assert invoke(["replay", "--own-code", str(tmp_path / "own")]) == OK
