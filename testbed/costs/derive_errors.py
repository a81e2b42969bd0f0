"""How wrong the device profiles are: leave-one-out errors, as ``reports/device_profiles/README.md``.

A point is left out, predicted from its neighbours along one axis as ``testbed.costs.tables`` would, and compared with
the measurement. Errors are relative, signed: above 0 the model is slower than the measurement. No random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from testbed.costs import derive
from testbed.costs.tables import DecodeAttention, GemmTable, PrefillAttention

Values = NDArray[np.float64]


class ErrorSet(NamedTuple):
    """Signed relative errors of one operator of one device."""

    device: str
    operator: str
    what: str
    errors: Values

    def row(self) -> str:
        """A line of the report's table, errors in per cent."""
        size = np.abs(self.errors)
        cells = (np.median(size), np.quantile(size, 0.9), np.mean(self.errors))
        numbers = " | ".join(f"{100 * cell:.1f}" for cell in cells)
        return f"| {self.device} | {self.operator} | {self.what} | {len(self.errors)} | {numbers} |"


def left_out(frame: pd.DataFrame, power: float = 1.0) -> Values:
    """Errors of predicting each inner column of ``frame`` from its neighbours, linearly in ``time ** power``."""
    axis = frame.columns.to_numpy(float)
    times = frame.to_numpy(float) ** power
    weight = (axis[1:-1] - axis[:-2]) / (axis[2:] - axis[:-2])
    predicted = (times[:, :-2] * (1 - weight) + times[:, 2:] * weight) ** (1 / power)
    errors: Values = predicted / times[:, 1:-1] ** (1 / power) - 1
    return errors[np.isfinite(errors)]


def all_errors(measured: Path) -> Iterator[ErrorSet]:
    """Every operator of every device."""
    for name, kernels in derive.AICONFIGURATOR.items():
        tables = derive.derive(name, measured)
        yield from _gemm_errors(name, kernels, measured, tables)
        yield from _attention_errors(name, kernels, measured, tables)
        comm = derive.read_kernels(kernels, measured, "comm/custom_allreduce_perf")
        table = comm.pivot_table(index=["num_gpus", "backend"], columns="message_size", values="ns")
        yield ErrorSet(name, "all-reduce", "one size left out", left_out(table))
        if "moe" in tables:
            for dtype, data in tables["moe"].items():
                frame = pd.DataFrame(data["ns"], columns=data["tokens"])
                yield ErrorSet(name, f"experts {dtype}", "one token count left out", left_out(frame))
    for name, (folder, models, _) in derive.LLMSERVINGSIM.items():
        yield from _profile_errors(name, measured / "llmservingsim_profiles" / folder, models, measured)


def _gemm_errors(name: str, kernels: derive.Kernels, measured: Path, tables: dict[str, Any]) -> Iterator[ErrorSet]:
    frame = derive.read_kernels(kernels, measured, "gemm/gemm_perf")
    frame = frame[(frame["n"] >= derive.GEMM_LEAST) & (frame["k"] >= derive.GEMM_LEAST)]
    for dtype, data in tables["gemm"].items():
        part = frame[frame["gemm_dtype"] == dtype]
        kept = part[part["m"].isin(data["m"])]
        for axis, others in (("m", ["n", "k"]), ("n", ["m", "k"]), ("k", ["m", "n"])):
            table = kept.pivot_table(index=others, columns=axis, values="ns")
            yield ErrorSet(name, f"GEMM {dtype}", f"one {axis} left out", left_out(table))
        table = GemmTable(data)
        errors = []
        for (n, k), rows in part[~part["m"].isin(data["m"])].groupby(["n", "k"]):
            curve = table.curve(int(n), int(k), lambda *_: 0.0)
            errors.append(np.array([curve.at(m) for m in rows["m"]]) / rows["ns"].to_numpy(float) - 1)
        yield ErrorSet(name, f"GEMM {dtype}", "token counts that the profile does not keep", np.concatenate(errors))


def _attention_errors(name: str, kernels: derive.Kernels, measured: Path, tables: dict[str, Any]) -> Iterator[ErrorSet]:
    heads = ["num_heads", "num_key_value_heads", "head_dim"]
    frame = derive.read_attention(kernels, measured, "context")
    frame = frame[(frame["attn_dtype"] == "bfloat16") & (frame["kv_cache_dtype"] == "bfloat16")]
    lengths = frame.pivot_table(index=[*heads, "batch_size"], columns="isl", values="ns")
    yield ErrorSet(name, "prefill attention", "one length left out", left_out(lengths, 0.5))
    batches = frame.pivot_table(index=[*heads, "isl"], columns="batch_size", values="ns")
    yield ErrorSet(name, "prefill attention", "one batch size left out", left_out(batches))
    frame = derive.read_attention(kernels, measured, "generation")
    for dtype, size in (("bfloat16", 2), ("fp8", 1)):
        if dtype not in tables["decode"]:
            continue
        part = frame[(frame["kv_cache_dtype"] == dtype) & (frame["batch_size"] <= 1024)]
        kv = 2.0 * size * part["num_key_value_heads"] * part["head_dim"] * part["batch_size"] * part["context"]
        cold = part[kv > kernels.l2_bytes]
        contexts = cold.pivot_table(index=[*heads, "batch_size"], columns="context", values="ns")
        yield ErrorSet(name, f"decode attention {dtype} KV", "one context left out", left_out(contexts))
        batches = cold.pivot_table(index=[*heads, "context"], columns="batch_size", values="ns")
        yield ErrorSet(name, f"decode attention {dtype} KV", "one batch size left out", left_out(batches))
        hot = part[kv <= kernels.l2_bytes]
        errors = _raised(hot, tables["decode"][dtype])
        yield ErrorSet(name, f"decode attention {dtype} KV", "KV in the L2 cache: raised on purpose", errors)


def _raised(hot: pd.DataFrame, tables: list[dict[str, Any]]) -> Values:
    errors: list[Values] = []
    for key, part in derive.by_heads(hot):
        table = DecodeAttention(tables, *key)
        for batch in sorted(part["batch_size"].unique()):
            rows = part[part["batch_size"] == batch]
            curve = table.curve(int(batch), lambda _: 0.0)
            errors.append(np.array([curve.at(c) for c in rows["context"]]) / rows["ns"].to_numpy(float) - 1)
    return np.concatenate(errors)


def _profile_errors(name: str, folder: Path, models: dict[str, str], measured: Path) -> Iterator[ErrorSet]:
    tables = derive.derive(name, measured)
    gemm = pd.DataFrame([row + [np.nan] * (len(derive.GEMM_M) - len(row)) for row in tables["gemm"]["bfloat16"]["ns"]])
    gemm.columns = pd.Index(derive.GEMM_M)
    yield ErrorSet(name, "GEMM bfloat16", "one m left out", left_out(gemm))
    sets: dict[tuple[str, str], list[Values]] = {}
    for model, preset in models.items():
        for run in sorted((folder / model / "bf16").glob("tp*")):
            attention = derive.read_layers(run / "attention.csv.gz")
            heads = derive.heads_of(preset, int(run.name.removeprefix("tp")))
            for key, errors in _mixed_errors(attention, tables, heads):
                sets.setdefault(key, []).append(errors)
    for (operator, what), parts in sets.items():
        yield ErrorSet(name, operator, what, np.concatenate(parts))


def _mixed_errors(
    frame: pd.DataFrame, tables: dict[str, Any], heads: tuple[int, int, int]
) -> Iterator[tuple[tuple[str, str], Values]]:
    measured = tables["prefill"]["bfloat16"]
    prefill = PrefillAttention(measured, *heads)
    whole = PrefillAttention([{k: v for k, v in table.items() if k != "prefix"} for table in measured], *heads)
    decode = DecodeAttention(tables["decode"]["bfloat16"], *heads)
    curves = {n: decode.curve(int(n), lambda _: 0.0) for n in frame["n_decode"].unique() if n}
    pure = frame[frame["prefill_chunk"] == 0].pivot_table(index="n_decode", columns="kv_decode", values="ns")
    yield ("decode attention bfloat16 KV", "one context left out"), left_out(pure)
    yield ("decode attention bfloat16 KV", "one batch size left out"), left_out(pure.T)
    alone = frame[(frame["n_decode"] == 0) & (frame["prefill_chunk"] > 0)]
    chunks = alone[alone["kv_prefill"] == 0].pivot_table(index="kv_prefill", columns="prefill_chunk", values="ns")
    yield ("prefill attention", "one length left out"), left_out(chunks, 0.5)
    behind = alone[alone["kv_prefill"] > 0]
    for small, part in behind.groupby(behind["prefill_chunk"] < 512):
        pairs = list(zip(part["prefill_chunk"], part["kv_prefill"], strict=True))
        times, size = part["ns"].to_numpy(float), "below" if small else "from"
        by_table: Values = np.array([prefill.at([n], [p]) for n, p in pairs])
        by_work: Values = np.array([whole.at([n], [p]) for n, p in pairs])
        yield ("prefill behind a prefix", f"table, chunks {size} 512"), by_table / times - 1
        yield ("prefill behind a prefix", f"rule of equal work alone, chunks {size} 512"), by_work / times - 1
    both = frame[(frame["n_decode"] > 0) & (frame["prefill_chunk"] > 0)]
    beside = DecodeAttention(tables["mixed_decode"]["bfloat16"], *heads)
    mixed = {n: beside.curve(int(n), lambda _: 0.0) for n in curves}
    rows = both[["prefill_chunk", "kv_prefill", "n_decode", "kv_decode"]].to_numpy().tolist()
    first: Values = np.array([prefill.at([n], [p]) for n, p, _, _ in rows])
    by_itself: Values = np.array([curves[n].at(c) for _, _, n, c in rows])
    added: Values = np.array([mixed[n].at(c) for _, _, n, c in rows])
    times = both["ns"].to_numpy(float)
    yield (
        ("mixed attention", "prefill plus decode rows as beside a prefill"),
        np.maximum(first + added, by_itself) / times - 1,
    )
    yield ("mixed attention", "prefill plus decode rows as alone"), (first + by_itself) / times - 1


_HEAD = """# Device profiles: what they are made of, and how far off they are

Command: `python -m testbed.costs.derive --errors reports/device_profiles` (needs the measurements; see `TESTBED_DATA`).
Date: 2026-11-21. No seed: nothing here is random, and the same measurements give the same bytes.

The profiles in `testbed/costs/devices` are derived from public per-operator measurements; each `NAME.yaml` names its
source, commit and licence, and `testbed/costs/derive.py` says what is done to the data. End-to-end measurements are not
used: they are kept for judging whole simulations.

## Leave-one-out errors

A measured point is left out and predicted from its neighbours along one axis, as the cost model reads its tables.
Errors are relative, in per cent: median and 90th percentile of the size, mean with its sign (above 0: too slow).
Neighbouring points lie a factor of 1.1 to 4 apart, so the error in use, between points that are all there, is smaller.
Experts, and products on the RTX cards, are left out of the profile's own (pooled) tables; all else of the measurements.

| device | operator | what | points | median | p90 | signed mean |
|---|---|---|---|---|---|---|
"""

_TAIL = """
![errors](errors.png)

![tables](tables.png)

## How to read it

* **Products**: the library changes its kernel between shapes and at whole tiles, so times jump by 10 to 20 %; the token
  counts that a profile leaves out are mostly those just above a tile, which is why their mean is negative.
* **Decode attention, KV in the L2 cache**: benchmarks repeat one layer, so a small KV stays in the cache; behind a
  whole model it does not. Those points are raised to the line between the shortest context and the first that does not
  fit; the row shows by how much (L40S, with its large cache and slow memory, most). Nothing measures how well.
* **Prefill behind a prefix** is measured on the two RTX cards only, where the cost model uses it. The rule of equal
  work, which stands for it on the other cards, is right there for chunks from 512 tokens and far too fast for short
  chunks behind a long prefix: that kernel reads the prefix in sequence. Kernels that split the prefix are nearer to the
  rule; which of the two a card's kernel does is not measured, so it is named *unmeasured*.
* **Mixed attention**: on the RTX cards decode rows beside a prefill cost two to four times what they cost alone (one
  kernel of the prefill kind computes both), and the cost model charges that. On the other cards nothing is measured and
  it charges what the rows cost alone.

## Not measured anywhere

Element-wise operators, embedding and sampling are bytes at a stated efficiency plus a constant a kernel; float32, FP8
on the RTX cards, all-reduce without a table, and routed experts outside H100, H200 and RTX PRO 6000 follow the formula
in the profile. `cost_model.unmeasured()` lists what a run used. A100's decode attention (SGLang 0.5.10) reaches half
of the memory bandwidth; this is what was measured there.
"""


def write_report(measured: Path, folder: Path) -> None:
    """Write ``README.md`` and its figures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = list(all_errors(measured))
    lines = "\n".join(item.row() for item in sets)
    (folder / "README.md").write_text(f"{_HEAD}{lines}\n{_TAIL}", encoding="utf-8")
    _draw_errors(sets, folder / "errors.png")
    _draw_tables(folder / "tables.png")


def _draw_errors(sets: list[ErrorSet], path: Path) -> None:
    from matplotlib.figure import Figure

    shown = [item for item in sets if "left out" in item.what]
    figure = Figure(figsize=(9, 0.2 * len(shown) + 1), layout="constrained")
    axes = figure.subplots()
    sizes = [100 * np.abs(item.errors) for item in shown]
    for i, size in enumerate(sizes):
        low, middle, high = np.quantile(size, [0.1, 0.5, 0.9])
        axes.plot([low, high], [i, i], color="tab:blue", linewidth=3, alpha=0.4, solid_capstyle="butt")
        axes.plot(middle, i, "o", color="tab:blue", markersize=4)
    labels = [f"{item.device}  {item.operator}: {item.what}" for item in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=6)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, 30)
    axes.set_xlabel("leave-one-out error, % (dot: median; bar: 10th to 90th percentile)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_tables(path: Path) -> None:
    from matplotlib.figure import Figure

    from testbed.batch import BatchShape
    from testbed.costs import OperatorCostModel, device_presets, load_device
    from testbed.scenario.models import load_model
    from testbed.scenario.schema import EngineConfig

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    model, engine = load_model("llama-3.1-8b"), EngineConfig(cuda_graph_max_bs=512)
    rows, lengths = [1, *range(8, 513, 8)], [int(x) for x in np.geomspace(16, 16384, 60)]
    for name in device_presets():
        cost = OperatorCostModel(model, load_device(name), engine)
        left.plot(rows, [cost.price_decode(b, b * 1000, 1000).gpu_ns / 1e6 for b in rows], label=name)
        rates = [1e6 * n / cost.price(BatchShape((n,), (0,))).gpu_ns for n in lengths]
        right.plot(lengths, rates, label=name)
    left.set(xlabel="decode rows, context 1,000", ylabel="step, ms", yscale="log", title="Llama-3.1-8B, bf16: decode")
    right.set(xlabel="prompt tokens", ylabel="thousand tokens a second", xscale="log", yscale="log", title="prefill")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    left.legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
