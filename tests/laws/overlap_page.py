"""The committed page of the overlap study."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from testbed.report.style import BLUE, MUTED, ORANGE, RED, house_style
from tests.laws.page import source_table


def write_page(folder: Path, table: pd.DataFrame, paced: pd.DataFrame, experiment: SimpleNamespace) -> None:
    """Write ``README.md``, two figures and two tables."""
    folder.mkdir(parents=True, exist_ok=True)
    swept, known = table[table["kind"] == "sweep"], table[table["kind"] == "engine"]
    table.to_csv(folder / "simulated.csv", index=False, float_format="%.6g")
    paced.to_csv(folder / "paced.csv", index=False, float_format="%.6g")
    experiment.draw(known).savefig(folder / "map.png", dpi=150)
    _curve(swept, known, paced).savefig(folder / "curve.png", dpi=150)
    off = [
        experiment.off_percent(swept, "simulated"),
        experiment.off_percent(known, "simulated", "exposed"),
        experiment.off_percent(known, "simulated"),
        experiment.off_percent(paced, "paced", "measured"),
        experiment.off_percent(paced, "paced"),
    ]
    (folder / "README.md").write_text("\n".join(_text(known, paced, off)) + "\n", encoding="utf-8")


def _text(known: pd.DataFrame, paced: pd.DataFrame, off: list[float]) -> list[str]:
    claimed = known[known["simulated"].between(0.2, 0.4)]
    return [
        "# What overlap gains",
        "",
        "A decode step takes c on the host and g on the device. The normal loop needs c + g for it, the overlapped",
        "loop the longer of the two; the gain in steps per second is (c + g) / max(c, g) - 1.",
        "",
        "| | furthest from the formula |",
        "|---|---:|",
        f"| simulated, sweep of constant c and g | {off[0]:.2g} % |",
        f"| simulated, hosts of engines, formula for the exposed part of c | {off[1]:.2g} % |",
        f"| simulated, hosts of engines, formula for the whole c | {off[2]:.2g} % |",
        f"| paced, on the wall clock, formula for the c that was measured | {off[3]:.2g} % |",
        f"| paced, formula for the c that was asked for | {off[4]:.2g} % |",
        "",
        "The exposed part: what a host does after a launch (sampling) runs beside the device in the normal loop too.",
        "That much of c is hidden already, and overlap gains less than c alone would say.",
        "",
        *source_table("simulate.4", "0", "constant times; modelled h100-sxm", "constant; the presets"),
        "",
        "![Map of the gain over c and g](map.png)",
        "",
        f"A gain of 20 to 40 % needs c/g between 0.2 and 0.4 (or 2.5 and 5). Of the {len(known)} combinations of host,",
        f"model and batch on the map {len(claimed)} gain that much:",
        "",
        *(f"- {row.host}, {row.model}, batch {row.batch:g}: {row.simulated:.0%}" for row in claimed.itertuples()),
        "",
        f"SGLang's host gains {_range(known, 'sglang-0.5', 'llama-3.1-8b')} with the 8B model and",
        f"{_range(known, 'sglang-0.5', 'qwen3-0.6b')} with 0.6B: a claim of 20 to 40 % holds for small models and",
        "slower hosts, not in general.",
        "",
        "| host | model | batch | c, ms | g, ms | formula | exposed | simulated |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row.host} | {row.model} | {row.batch:g} | {row.c_ms:.2f} | {row.g_ms:.2f} | {row.formula:.1%} "
            f"| {row.exposed:.1%} | {row.simulated:.1%} |"
            for row in known.itertuples()
        ),
        "",
        "![Gain over c/g, formula, simulated and paced](curve.png)",
        "",
        "Paced: the loop, the clock and the host are real, the device is a time to wait for. Best of five runs a loop,",
        "noise is how much slower the slowest was. Other work ran on the two cores meanwhile, and a thread that is put",
        "aside in the middle of its work takes longer for it: c is therefore measured too, step by step.",
        "",
        "| c, ms | g, ms | formula | c measured, normal and overlap, ms | formula for it | paced | noise |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row.c_ms:g} | {row.g_ms:g} | {row.formula:.1%} | {row.c_normal_ms:.2f}, {row.c_overlap_ms:.2f} "
            f"| {row.measured:.1%} | {row.paced:.1%} | {row.noise:.1%} |"
            for row in paced.itertuples()
        ),
    ]


def _range(known: pd.DataFrame, host: str, model: str) -> str:
    gains = known[(known["host"] == host) & (known["model"] == model)]["simulated"] * 100
    low, high = round(gains.min()), round(gains.max())
    return f"{low} %" if low == high else f"{low} to {high} %"


def _curve(swept: pd.DataFrame, known: pd.DataFrame, paced: pd.DataFrame) -> Figure:
    """Every point falls on one curve over c/g."""
    with house_style("overlap curve"):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        ratio = np.geomspace(0.01, 100, 400)
        axes.axhspan(20, 40, color=ORANGE, alpha=0.12, linewidth=0)
        axes.plot(ratio, ((1 + ratio) / np.maximum(ratio, 1) - 1) * 100, color=MUTED, label="formula")
        points = (
            (swept, "simulated", "o", BLUE, "simulated, sweep"),
            (known, "simulated", ".", RED, "simulated, engines"),
        )
        for table, column, marker, colour, label in (*points, (paced, "paced", "s", ORANGE, "paced")):
            axes.plot(table["c_ms"] / table["g_ms"], table[column] * 100, marker, color=colour, label=label)
        axes.set(xscale="log", xlabel="c / g", ylabel="gain in steps per second, %", ylim=(0, 110))
        axes.set_title("Overlap pays where host and device take about as long; shaded: 20 to 40 %")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(loc="upper left")
    return figure
