"""Compact device profiles from public measurements: ``python -m testbed.costs.derive``.

Reads ``measured/aiconfigurator_kernels`` and ``measured/llmservingsim_profiles`` under the data root and writes, for
each device, ``devices/NAME.json`` (operator tables) beside the hand-written ``devices/NAME.yaml`` (datasheet, sources).
The bytes of the output depend on the input only.

What is done to the measurements, in this order:

* Kernels are those that the engine picks by default; one layer, one call, milliseconds or microseconds to nanoseconds.
* Decode attention whose KV fits in the L2 cache was measured with KV in the cache; behind a whole model it is not. Such
  a point is raised to the straight line, in context, from the shortest context to the first that does not fit.
* Times that fall while the work grows are pooled (isotonic regression of their logarithms).
* A subset of the points along each axis is kept, four significant digits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from testbed.scenario.errors import InputError
from testbed.scenario.models import load_model
from testbed.scenario.paths import data_root

Matrix = NDArray[np.float64]
DEVICES = Path(__file__).parent / "devices"
GEMM_M = (
    *(1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256),
    *(512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768),
)
"""Tokens at which products are kept."""
GEMM_LEAST = 256
"""Narrower products than this do not occur in a decoder's layers."""
HEAD_DIMS = (64, 128)
RESOLUTION_NS = 500.0
"""Differences of two measurements below this are noise."""
MOE_SKEW = "power_law_1.01"
"""Routing of the kept expert measurements: mildly skewed."""


@dataclass(frozen=True)
class Kernels:
    """Where one device's AIConfigurator tables lie, and which kernels of them are the engine's default."""

    folder: str
    version: str
    l2_bytes: float
    fp8: bool
    attention: str = ""
    """Kernel of head size 128; empty: the only one."""


AICONFIGURATOR = {
    "h100-sxm": Kernels("h100_sxm", "0.5.14", 50e6, True, "fa3"),
    "h200-sxm": Kernels("h200_sxm", "0.5.14", 50e6, True, "fa3"),
    "a100-sxm": Kernels("a100_sxm", "0.5.10", 40e6, False),
    "l40s": Kernels("l40s", "0.5.14", 96e6, True, "flashinfer"),
    "b200": Kernels("b200_sxm", "0.5.14", 126e6, True, "trtllm_mha"),
}
LLMSERVINGSIM = {
    "rtx-pro-6000": (
        "RTXPRO6000",
        {
            "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
            "Qwen/Qwen3-32B": "qwen3-32b",
            "Qwen/Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b",
        },
        128e6,
    ),
    "rtx-4090": ("RTX4090", {"meta-llama/Llama-3.1-8B": "llama-3.1-8b"}, 72e6),
}


def main() -> None:
    """Write the tables of every device, and with ``--errors`` the pages of ``reports/device_profiles``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=DEVICES, help="folder of the profiles")
    parser.add_argument("--errors", type=Path, help="write leave-one-out errors and figures into this folder")
    arguments = parser.parse_args()
    measured = measured_root()
    for name in (*AICONFIGURATOR, *LLMSERVINGSIM):
        path = arguments.output / f"{name}.json"
        path.write_text(dump(derive(name, measured)), encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    if arguments.errors:
        from testbed.costs.derive_errors import write_report

        write_report(measured, arguments.errors)


def measured_root() -> Path:
    """The folder of the measurements; InputError when there is none."""
    root = data_root()
    if root is None or not (root / "measured").is_dir():
        message = "the measurements that device profiles are derived from are not here"
        raise InputError(message, where="TESTBED_DATA", remedy="set it to a folder that holds measured/")
    return root / "measured"


def derive(name: str, measured: Path) -> dict[str, Any]:
    """The operator tables of one device, as ``devices/NAME.json`` holds them (times in ns)."""
    if name in AICONFIGURATOR:
        return _aiconfigurator(AICONFIGURATOR[name], measured)
    folder, models, l2_bytes = LLMSERVINGSIM[name]
    return _llmservingsim(measured / "llmservingsim_profiles" / folder, models, l2_bytes)


def dump(tables: dict[str, Any]) -> str:
    """JSON with one list of numbers a line, so that a change of the data shows as changed lines."""

    def render(value: Any, indent: str) -> str:
        if isinstance(value, dict):
            deeper = indent + " "
            items = ",\n".join(f"{deeper}{json.dumps(key)}: {render(item, deeper)}" for key, item in value.items())
            return f"{{\n{items}\n{indent}}}"
        if isinstance(value, list) and value and isinstance(value[0], (list, dict)):
            lines = ",\n".join(indent + render(item, indent) for item in value)
            return f"[\n{lines}\n{indent}]"
        return json.dumps(value, separators=(",", ":"))

    return render(tables, "") + "\n"


# ---- shared steps ----------------------------------------------------------------------------------------------------


def kept(times_ns: Iterable[float]) -> list[int]:
    """Whole nanoseconds with four significant digits."""
    return [round(float(f"{t:.4g}")) for t in times_ns]


def rising(times: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """``times`` without descents along ``axis``: least squares on logarithms; NaN stays NaN."""

    def along(row: NDArray[np.float64]) -> NDArray[np.float64]:
        out, known = row.copy(), np.isfinite(row)
        if known.any():
            out[known] = np.exp(isotonic_regression(np.log(row[known])).x)
        return out

    return np.apply_along_axis(along, axis, times)


def rising_both(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """``times`` [a, b] without descents along either axis."""
    pooled = rising(rising(times, 1), 0)
    filled = np.where(np.isfinite(pooled), pooled, 0.0)
    highest = np.maximum.accumulate(np.maximum.accumulate(filled, 0), 1)
    return np.where(np.isfinite(pooled), highest, np.nan)


def cold(times: Matrix, context: NDArray[np.float64], kv_bytes: Matrix, l2: float) -> Matrix:
    """Decode attention ``times`` and ``kv_bytes`` [batch, context], as if no KV lay in an L2 cache of ``l2`` bytes."""
    out = times.copy()
    for row, size in zip(out, kv_bytes, strict=True):
        fits = (size <= l2) & np.isfinite(row)
        beyond = np.flatnonzero((size > l2) & np.isfinite(row))
        if fits.any() and beyond.size:
            first = beyond[0]
            line = row[0] + (row[first] - row[0]) * (context - context[0]) / (context[first] - context[0])
            row[fits] = np.maximum(row[fits], line[fits])
    return out


def ragged(times: NDArray[np.float64]) -> list[list[int]]:
    """Rows of kept times, each without the unmeasured end."""
    return [kept(row[: int(np.isfinite(row).sum())]) for row in times]


def _grid(frame: pd.DataFrame, row: str, column: str) -> pd.DataFrame:
    """Median latency (ns) by two columns; rows whose measured part has holes are cut at the first hole."""
    table = frame.pivot_table(index=row, columns=column, values="ns", aggfunc="median")
    return table.where(table.notna().cummin(axis=1))


# ---- AIConfigurator --------------------------------------------------------------------------------------------------


def read_kernels(kernels: Kernels, measured: Path, operator: str) -> pd.DataFrame:
    """One AIConfigurator table with a column ``ns``; ``operator`` names it, e.g. ``gemm/gemm_perf``."""
    group, file = operator.split("/")
    base = measured / "aiconfigurator_kernels" / "data" / kernels.folder / group / "sglang" / kernels.version
    frame = pd.read_parquet(base / f"{file}.parquet")
    return frame.assign(ns=frame["latency"] * 1e6)


def read_attention(kernels: Kernels, measured: Path, operator: str) -> pd.DataFrame:
    """Attention measurements of the default kernels, full window, at the head sizes that are kept."""
    frame = read_kernels(kernels, measured, f"attention/{operator}_attention_perf")
    if "window_size" in frame:
        frame = frame[frame["window_size"] == 0]
    frame = frame[frame["head_dim"].isin(HEAD_DIMS)]
    if kernels.attention:
        frame = frame[(frame["kernel_source"] == kernels.attention) | (frame["head_dim"] != 128)]
    return frame.assign(context=frame["isl"] + frame["step"])


def _aiconfigurator(kernels: Kernels, measured: Path) -> dict[str, Any]:
    gemm = read_kernels(kernels, measured, "gemm/gemm_perf")
    dtypes = ("bfloat16", "fp8") if kernels.fp8 else ("bfloat16",)
    decode = read_attention(kernels, measured, "generation")
    prefill = read_attention(kernels, measured, "context")
    prefill = prefill[(prefill["attn_dtype"] == "bfloat16") & (prefill["kv_cache_dtype"] == "bfloat16")]
    tables: dict[str, Any] = {
        "gemm": {dtype: _gemm_grid(gemm[gemm["gemm_dtype"] == dtype]) for dtype in dtypes},
        "prefill": {"bfloat16": [_prefill(key, part) for key, part in by_heads(prefill)]},
        "decode": {
            dtype: [_decode(key, part, kernels.l2_bytes, size) for key, part in by_heads(_of_kv(decode, dtype))]
            for dtype, size in (("bfloat16", 2), ("fp8", 1))
            if len(_of_kv(decode, dtype))
        },
        "all_reduce": _all_reduce(read_kernels(kernels, measured, "comm/custom_allreduce_perf")),
    }
    if (measured / "aiconfigurator_kernels" / "data" / kernels.folder / "moe").is_dir():
        tables["moe"] = _moe(read_kernels(kernels, measured, "moe/moe_perf"))
    return tables


def _of_kv(frame: pd.DataFrame, dtype: str) -> pd.DataFrame:
    return frame[frame["kv_cache_dtype"] == dtype]


def by_heads(frame: pd.DataFrame) -> list[tuple[tuple[int, int, int], pd.DataFrame]]:
    """Parts of an attention table by (heads, KV heads, head size), in that order."""
    columns = ["num_heads", "num_key_value_heads", "head_dim"]
    keys = sorted({(int(h), int(kv), int(d)) for h, kv, d in frame[columns].drop_duplicates().to_numpy()})
    index = frame.set_index(columns).sort_index()
    return [(key, index.loc[[key]].reset_index()) for key in keys]


def _gemm_grid(frame: pd.DataFrame) -> dict[str, Any]:
    frame = frame[(frame["n"] >= GEMM_LEAST) & (frame["k"] >= GEMM_LEAST)]
    table = frame.pivot_table(index=["n", "k"], columns="m", values="ns", aggfunc="median")
    for side in sorted({n for n, _ in table.index} & {k for _, k in table.index}):
        if (side, side) not in table.index:  # too large to be measured: as the product of half of it, twice
            below = max(n for n, k in table.index if k == side and n < side)
            table.loc[(side, side), :] = table.loc[(below, side)] * (side / below)
    table = table.sort_index()
    smooth = pd.DataFrame(rising(table.to_numpy(float)), index=table.index, columns=table.columns)[list(GEMM_M)]
    shapes = [[int(n), int(k)] for n, k in table.index]
    return {"m": list(GEMM_M), "shapes": shapes, "ns": [kept(row) for row in smooth.to_numpy()]}


def _prefill(heads: tuple[int, int, int], frame: pd.DataFrame) -> dict[str, Any]:
    table = _grid(frame, "batch_size", "isl")
    return {
        **_heads(heads),
        "batch": [int(b) for b in table.index],
        "length": [int(length) for length in table.columns],
        "ns": ragged(rising_both(table.to_numpy(float))),
    }


def _decode(heads: tuple[int, int, int], frame: pd.DataFrame, l2_bytes: float, kv_size: int) -> dict[str, Any]:
    table = _grid(frame[frame["batch_size"] <= 1024], "batch_size", "context")
    batch, context = table.index.to_numpy(float), table.columns.to_numpy(float)
    kv_bytes = 2.0 * kv_size * heads[1] * heads[2] * batch[:, None] * context[None, :]
    times = rising_both(cold(table.to_numpy(float), context, kv_bytes, l2_bytes))
    wanted = [i for i, c in enumerate(context) if c in (2, 16) or c >= 64]
    return {
        **_heads(heads),
        "batch": [int(b) for b in batch],
        "context": [int(context[i]) for i in wanted],
        "ns": ragged(times[:, wanted]),
    }


def _heads(heads: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))


def _all_reduce(frame: pd.DataFrame) -> dict[str, Any]:
    elements = sorted(int(size) for size in frame["message_size"].unique())
    mode = frame["backend"].str.rsplit("_", n=1).str[-1]
    tables: dict[str, Any] = {"elements": elements}
    for name in ("graph", "eager"):
        table = frame[mode == name].pivot_table(index="num_gpus", columns="message_size", values="ns")
        tables[name] = {str(gpus): kept(row) for gpus, row in zip(table.index, rising(table.to_numpy()), strict=True)}
    return tables


def _moe(frame: pd.DataFrame) -> dict[str, Any]:
    chosen = frame[
        (frame["distribution"] == MOE_SKEW)
        & (frame["moe_ep_size"] == 1)
        & (frame["moe_tp_size"] <= 8)
        & (frame["kernel_source"] == "sglang_fused_moe_triton")
    ]
    width = chosen["inter_size"] // chosen["moe_tp_size"]
    chosen = chosen.assign(width=width)
    out: dict[str, Any] = {}
    for dtype, ours in (("bfloat16", "bfloat16"), ("fp8_block", "fp8")):
        part = chosen[chosen["moe_dtype"] == dtype]
        keys = ["hidden_size", "width", "topk", "num_experts"]
        table = part.pivot_table(index=keys, columns="num_tokens", values="ns", aggfunc="median").dropna()
        out[ours] = {
            "tokens": [int(t) for t in table.columns],
            "shapes": [[int(x) for x in key] for key in table.index],
            "ns": [kept(row) for row in rising(table.to_numpy(float))],
        }
    return out


# ---- LLMServingSim ---------------------------------------------------------------------------------------------------


def read_layers(path: Path) -> pd.DataFrame:
    """One LLMServingSim table with a column ``ns``."""
    frame = pd.read_csv(path)
    return frame.assign(ns=frame["time_us"] * 1e3)


def _llmservingsim(folder: Path, models: dict[str, str], l2_bytes: float) -> dict[str, Any]:
    shapes: dict[tuple[int, int], list[int]] = {}
    prefill: dict[tuple[int, int, int], dict[str, Any]] = {}
    decode: dict[tuple[int, int, int], dict[str, Any]] = {}
    mixed: dict[tuple[int, int, int], dict[str, Any]] = {}
    tables: dict[str, Any] = {}
    for measured, preset in models.items():
        for run in sorted((folder / measured / "bf16").glob("tp*")):
            tp = int(run.name.removeprefix("tp"))
            heads = heads_of(preset, tp)
            attention = read_layers(run / "attention.csv.gz")
            prefill.setdefault(heads, _prefill_behind_prefix(heads, attention))
            decode.setdefault(heads, _decode_alone(heads, attention, l2_bytes))
            mixed.setdefault(heads, _decode_beside_prefill(heads, attention))
            shapes.update({k: v for k, v in layer_gemms(run, preset, tp).items() if k not in shapes})
            if (run / "moe.csv.gz").is_file():
                tables["moe"] = {"bfloat16": _moe_by_activation(read_layers(run / "moe.csv.gz"), preset)}
    order = sorted(shapes)
    gemm = {"m": list(GEMM_M), "shapes": [list(shape) for shape in order], "ns": [shapes[shape] for shape in order]}
    return {
        "gemm": {"bfloat16": gemm},
        "prefill": {"bfloat16": [prefill[key] for key in sorted(prefill)]},
        "decode": {"bfloat16": [decode[key] for key in sorted(decode)]},
        "mixed_decode": {"bfloat16": [mixed[key] for key in sorted(mixed)]},
        **tables,
    }


def heads_of(preset: str, tp: int) -> tuple[int, int, int]:
    """Heads, KV heads and head size of a model on one of ``tp`` devices."""
    model = load_model(preset)
    return model.heads // tp, model.kv_heads_per_gpu(tp), model.head_dim


def layer_gemms(run: Path, preset: str, tp: int) -> dict[tuple[int, int], list[int]]:
    """Times over ``GEMM_M`` (as far as measured) of a profiled model's products, by their shape (n, k)."""
    model = load_model(preset)
    shapes = {
        "qkv_proj": (model.qkv_width // tp, model.hidden),
        "o_proj": (model.hidden, model.heads * model.head_dim // tp),
        "gate_up_proj": (2 * model.intermediate // tp, model.hidden),
        "down_proj": (model.hidden, model.intermediate // tp),
        "lm_head": (model.vocab // tp, model.hidden),
    }
    dense = read_layers(run / "dense.csv.gz")
    sampled = read_layers(run / "per_sequence.csv.gz").rename(columns={"sequences": "tokens"})
    frame = pd.concat([dense, sampled])
    out = {}
    for layer, shape in shapes.items():
        part = frame[frame["layer"] == layer].groupby("tokens")["ns"].median()
        if len(part):
            smooth = pd.Series(rising(part.to_numpy(float)), index=part.index)
            measured = [m for m in GEMM_M if m in smooth.index]
            if measured != list(GEMM_M[: len(measured)]):
                raise InputError(f"{layer} has holes at {GEMM_M}", where=str(run), remedy="measure them")
            out[shape] = kept(smooth[measured])
    return out


def _prefill_behind_prefix(heads: tuple[int, int, int], frame: pd.DataFrame) -> dict[str, Any]:
    """Whole prompts, continued past the longest chunk by that chunk behind prefixes (as equal work); and all chunks."""
    alone = frame[(frame["n_decode"] == 0) & (frame["prefill_chunk"] > 0)]
    table = alone.pivot_table(index="kv_prefill", columns="prefill_chunk", values="ns", aggfunc="median")
    doubling = [[int(x) for x in axis if int(x) & (int(x) - 1) == 0] for axis in (table.index, table.columns)]
    table = table.loc[doubling[0], doubling[1]].dropna(axis=1)
    times = rising_both(table.to_numpy(float))
    chunk, prefix = table.columns.to_numpy(float), table.index.to_numpy(float)
    longest = np.round(np.sqrt(chunk[-1] * (chunk[-1] + 2 * prefix[1:])))
    further = longest >= 1.25 * chunk[-1]
    length = [int(c) for c in (*chunk, *longest[further])]
    whole = np.maximum.accumulate(np.concatenate([times[0], times[1:, -1][further]]))
    behind = {
        "prefix": [int(p) for p in prefix],
        "chunk": [int(c) for c in chunk],
        "ns": [kept(row) for row in times],
    }
    return {**_heads(heads), "batch": [1], "length": length, "ns": [kept(whole)], "prefix": behind}


def _decode_alone(heads: tuple[int, int, int], frame: pd.DataFrame, l2_bytes: float) -> dict[str, Any]:
    table = _grid(frame[frame["prefill_chunk"] == 0], "n_decode", "kv_decode")
    batch, context = table.index.to_numpy(float), table.columns.to_numpy(float)
    kv_bytes = 4.0 * heads[1] * heads[2] * batch[:, None] * context[None, :]
    times = rising_both(cold(table.to_numpy(float), context, kv_bytes, l2_bytes))
    return {
        **_heads(heads),
        "batch": [int(b) for b in batch],
        "context": [int(c) for c in context],
        "ns": ragged(times),
    }


def _decode_beside_prefill(heads: tuple[int, int, int], frame: pd.DataFrame) -> dict[str, Any]:
    """What decode rows add to a batch that also prefills: their time beside the shortest chunk, less that chunk's.

    Such a batch runs as one kernel of the prefill kind, which does not split a row's context, so its rows cost more
    than in a decode step.
    """
    shortest = frame.loc[frame["prefill_chunk"] > 0, "prefill_chunk"].min()
    beside = frame[(frame["prefill_chunk"] == shortest) & (frame["kv_prefill"] == 0)]
    table = _grid(beside[beside["n_decode"] > 0], "n_decode", "kv_decode")
    alone = float(beside.loc[beside["n_decode"] == 0, "ns"].median())
    added = np.maximum(table.to_numpy(float) - alone, RESOLUTION_NS)
    return {
        **_heads(heads),
        "batch": [int(b) for b in table.index],
        "context": [int(c) for c in table.columns],
        "ns": ragged(rising_both(added)),
    }


def _moe_by_activation(frame: pd.DataFrame, preset: str) -> dict[str, Any]:
    """Times over tokens, at the number of experts that so many tokens activate when each picks evenly."""
    model = load_model(preset)
    table = frame.pivot_table(index="tokens", columns="activated_experts", values="ns")
    share = model.experts_per_token / model.experts
    times = []
    for tokens, row in table.iterrows():
        active = model.experts * (1 - (1 - share) ** float(str(tokens)))
        known = row.dropna()
        times.append(float(np.interp(active, known.index.to_numpy(float), known.to_numpy(float))))
    shape = [model.hidden, model.moe_intermediate, model.experts_per_token, model.experts]
    return {
        "tokens": [int(t) for t in table.index.to_numpy()],
        "shapes": [shape],
        "ns": [kept(rising(np.array(times)))],
    }


if __name__ == "__main__":
    main()
