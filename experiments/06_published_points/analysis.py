# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Do the device profiles predict what others measured?
#
# 42 published closed-loop points and one published run, against the simulator with device and host profiles as shipped.
# The one constant fitted is what the profiles do not hold: the time between the client and the scheduler.

# %%
import json
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(HERE.parent))

from common import is_smoke, provenance, save, save_figure, variants
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import least_squares

from testbed.costs.derive import measured_root
from testbed.report.style import BLUE, MUTED, ORANGE, house_style

SCENARIOS = {"sglang": HERE / "scenario.yaml", "vllm": HERE / "vllm.yaml"}
COLOURS = {"sglang": BLUE, "vllm": ORANGE}
METRICS = ("ttft", "tpot")
BARS = {"ttft": 25.0, "tpot": 15.0}
"""Mean absolute error on the judged part, percent."""
POINT = ["engine", "isl", "osl", "concurrency"]
WAVES = 10
"""Requests a client sends."""
SMOKE_POINTS = [("sglang", 1024, 128, 64), ("sglang", 1024, 256, 16), ("vllm", 1024, 1024, 8), ("vllm", 8192, 1024, 4)]


# %%
def measured_points(smoke: bool) -> pd.DataFrame:
    """The published points: POINT, ``ttft_ms`` and ``tpot_ms`` (means), and ``part``: fitted or judged.

    A small run takes a few, all judged, from the committed table. Raises InputError where the data is not at hand.
    """
    if smoke:
        table = pd.read_csv(HERE / "results" / "table.csv")[[*POINT, "ttft_ms", "tpot_ms", "part"]]
        return table[[row in SMOKE_POINTS for row in table[POINT].itertuples(index=False, name=None)]]
    read = pd.read_csv(measured_root() / "silicon_e2e" / "silicon_give.csv")
    read = read.rename(columns={"backend": "engine", "batch_size": "concurrency"}).sort_values(POINT, ignore_index=True)
    points = read[POINT].assign(ttft_ms=read["silicon_ttft_ms"], tpot_ms=read["silicon_tpot_ms"])
    ranks = points.groupby("engine")[POINT[1:]].rank(method="dense").sum(axis=1)
    return points.assign(part=np.where(ranks % 3 == 0, "fitted", "judged"))


def lengths(engine: str, tokens: int) -> str:
    """As the clients draw them: SGLang's are fixed; vLLM's lie between 0.8 of the length and the whole of it
    (``sample_random_requests`` of github.com/kimbochen/bench_serving at the benchmark's range ratio of 0.8)."""
    return str(tokens) if engine == "sglang" else f"{{kind: uniform, low: {int(0.8 * tokens)}, high: {tokens}}}"


def ending_early(osl: int, percent: int) -> str:
    """Outputs of which so many percent end early, evenly from a quarter of their length on."""
    quantiles = f"{{p0: {osl // 4}, p{percent}: {osl}, p100: {osl}}}"
    return f"{{kind: empirical, column: output_tokens, quantiles: {quantiles}}}"


@cache
def simulated(engine: str, isl: int, osl: int, concurrency: int, outputs: str = "") -> dict[str, tuple[float, float]]:
    """By variant of the scenario: mean TTFT from the scheduler's receipt on, and mean TPOT (ms). ``outputs``: another
    law of the outputs' lengths."""
    runs = variants(
        SCENARIOS[engine],
        f"workload.arrivals.users={concurrency}",
        f"workload.count={WAVES * concurrency}",
        f"workload.lengths.prompt_tokens={lengths(engine, isl)}",
        f"workload.lengths.output_tokens={outputs or lengths(engine, osl)}",
        *((f"engine.max_running_requests={concurrency}",) if engine == "vllm" else ()),
    )
    found = {name: run.aggregates() for name, run in runs.items()}
    return {name: (float(one["mean_ttft_ms"]), float(one["mean_tpot_ms"])) for name, one in found.items()}


def fit_frontend(points: pd.DataFrame) -> tuple[float, float]:
    """The time before and behind the scheduler (ms) that suits the fitting part best, and its standard error.

    Least squares of the logarithm of TTFT; ``points`` of one engine with their ``shipped_ttft_ms``.
    """
    part = points[points["part"] == "fitted"]

    def residuals(added_ms: np.ndarray) -> np.ndarray:
        return np.asarray(np.log((part["shipped_ttft_ms"] + added_ms[0]) / part["ttft_ms"]))

    found = least_squares(residuals, [10.0], bounds=(0.0, np.inf))
    variance = 2.0 * found.cost / (len(part) - 1)
    return float(found.x[0]), float(np.sqrt(variance / (found.jac**2).sum()))


def frontends(points: pd.DataFrame, smoke: bool) -> dict[str, float]:
    """``ENGINE_frontend_ms`` and its standard error: fitted; in a small run those of the committed results."""
    if smoke:
        kept: dict[str, float] = json.loads((HERE / "results" / "figures.json").read_text(encoding="utf-8"))
        return {name: value for name, value in kept.items() if "frontend" in name}
    out = {}
    for engine, rows in points.groupby("engine"):
        out[f"{engine}_frontend_ms"], out[f"{engine}_frontend_standard_error_ms"] = fit_frontend(rows)
    return out


def predicted(points: pd.DataFrame, smoke: bool) -> tuple[pd.DataFrame, dict[str, float]]:
    """``points`` with predictions and signed errors (percent), and the fitted constants."""
    found = [simulated(*point)["as shipped"] for point in points[POINT].itertuples(index=False)]
    points = points.assign(**dict(zip(("shipped_ttft_ms", "predicted_tpot_ms"), zip(*found, strict=True), strict=True)))
    fitted = frontends(points, smoke)
    points["predicted_ttft_ms"] = points["shipped_ttft_ms"] + points["engine"].map(lambda e: fitted[f"{e}_frontend_ms"])
    for error, time in (("shipped_ttft", "ttft"), ("predicted_ttft", "ttft"), ("predicted_tpot", "tpot")):
        points[f"{error}_error"] = 100 * (points[f"{error}_ms"] / points[f"{time}_ms"] - 1)
    return points, fitted


# %% [markdown]
# ## The run, request by request


# %%
@cache
def replayed() -> dict[str, pd.DataFrame]:
    """By variant: the published run by request, in order of arrival, with TTFT, TPOT and E2E (ms) as measured and
    ``predicted_``.

    A request arrives when the engine has queued it: what its client did before is not the engine's.
    """
    read = pd.read_csv(measured_root() / "llmservingsim_vllm_run" / "RTXPRO6000_Llama-3.1-8B" / "requests.csv")
    first, last = (1e3 * (read[f"{token}_token_s"] - read["queued_s"]) for token in ("first", "last"))
    names = {"request_id": "id", "input_toks": "prompt_tokens", "output_toks": "output_tokens", "queued_s": "arrival_s"}
    asked = read[list(names)].rename(columns=names).sort_values("arrival_s")
    measured = asked.assign(ttft_ms=first, tpot_ms=(last - first) / (read["output_toks"] - 1), e2el_ms=last)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "requests.csv"
        asked.to_csv(trace, index=False)
        runs = variants(HERE / "per_request.yaml", f"workload.requests.trace={trace}")
    out = {}
    for name, run in runs.items():
        found = run.requests.set_index("id")[["ttft_ms", "tpot_ms", "e2el_ms"]].astype(float).add_prefix("predicted_")
        out[name] = measured.join(found, on="id", validate="one_to_one")
    return out


def errors_of_run(requests: pd.DataFrame) -> dict[str, float]:
    """Signed errors (percent) of the means and the makespan; mean absolute errors of a request; their deciles."""
    out = {}
    for metric in ("ttft", "tpot", "e2el"):
        measured, found = requests[f"{metric}_ms"], requests[f"predicted_{metric}_ms"]
        error = 100 * (found / measured - 1)
        out[f"mean_{metric}_error"] = 100 * (found.mean() / measured.mean() - 1)
        out[f"request_{metric}_absolute"] = error.abs().mean()
        out |= {f"request_{metric}_p{q}": error.quantile(q / 100) for q in (10, 50, 90)}
    ends = [(1e3 * requests["arrival_s"] + requests[f"{kind}e2el_ms"]).max() for kind in ("", "predicted_")]
    return {**out, "makespan_error": 100 * (ends[1] / ends[0] - 1)}


# %%
def study(smoke: bool) -> tuple[pd.DataFrame, dict[str, float]]:
    """One row a point, and the figures; a small run leaves out the run by request, whose data is not in the project."""
    points, fitted = predicted(measured_points(smoke), smoke)
    figures = {} if smoke else fitted
    for (engine, part), rows in points.groupby(["engine", "part"]):
        for kind in ("predicted_ttft", "predicted_tpot", "shipped_ttft"):
            figures[f"{engine}_{part}_{kind}_absolute"] = rows[f"{kind}_error"].abs().mean()
            figures[f"{engine}_{part}_{kind}_signed"] = rows[f"{kind}_error"].mean()
    if not smoke:
        figures |= {f"run_{name}": value for name, value in errors_of_run(replayed()["as shipped"]).items()}
    return points, figures


def what_if(points: pd.DataFrame) -> pd.DataFrame:
    """Mean absolute and mean signed errors (percent) over all points when one assumption is another, without the front
    end; of the run by request, the errors of its means."""
    rows = []
    for point in points.itertuples(index=False):
        key = (point.engine, point.isl, point.osl, point.concurrency)
        cases = simulated(*key)
        if point.engine == "sglang":
            cases = cases | {"1 % end early": simulated(*key, ending_early(point.osl, 1))["as shipped"]}
        for name, (ttft_ms, tpot_ms) in cases.items():
            rows.append((point.engine, name, 100 * (ttft_ms / point.ttft_ms - 1), 100 * (tpot_ms / point.tpot_ms - 1)))
    for name, requests in replayed().items():
        errors = errors_of_run(requests)
        rows.append(("vllm by request", name, errors["mean_ttft_error"], errors["mean_tpot_error"]))
    grouped = pd.DataFrame(rows, columns=["engine", "assumption", "ttft", "tpot"]).groupby(["engine", "assumption"])
    signed, absolute = grouped.mean().add_suffix("_signed"), grouped.agg(lambda column: column.abs().mean())
    return absolute.add_suffix("_absolute").join(signed).reset_index()


# %%
def draw_points(points: pd.DataFrame) -> Figure:
    """Predicted over measured by point, with the bars as bands."""
    with house_style("published points"):
        figure = Figure(figsize=(9.6, 4.6), layout="constrained")
        for axes, metric in zip(figure.subplots(1, 2), METRICS, strict=True):
            for (engine, part), rows in points.groupby(["engine", "part"]):
                colour = COLOURS[engine]
                face = colour if part == "judged" else "none"
                x, y = rows[f"{metric}_ms"], rows[f"predicted_{metric}_error"]
                axes.scatter(x, y, s=26, facecolors=face, edgecolors=colour, label=f"{engine}, {part}")
            _band(axes, BARS[metric])
            axes.set(xscale="log", xlabel=f"measured mean {metric.upper()}, ms", ylabel="error of the prediction, %")
            axes.set_title(metric.upper())
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _band(axes: Axes, bar: float) -> None:
    axes.axhspan(-bar, bar, color=MUTED, alpha=0.08, linewidth=0)
    axes.axhline(0, color=MUTED, linewidth=0.8)


def draw_run(runs: dict[str, pd.DataFrame]) -> Figure:
    """TTFT and TPOT by arrival: measured, and predicted for both loops."""
    with house_style("published run"):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        for axes, metric, unit_ms, unit in zip(figure.subplots(1, 2), METRICS, (1e3, 1.0), ("s", "ms"), strict=True):
            requests = runs["as shipped"]
            axes.scatter(requests["arrival_s"], requests[f"{metric}_ms"] / unit_ms, s=9, color=MUTED, label="measured")
            for (name, found), colour in zip(runs.items(), (BLUE, ORANGE), strict=True):
                y = found[f"predicted_{metric}_ms"] / unit_ms
                axes.plot(found["arrival_s"], y, ".", ms=3, color=colour, label=f"predicted, {name}")
            axes.set(xlabel="arrival, s", ylabel=f"{metric.upper()}, {unit}", ylim=(0, None))
            axes.set_title(metric.upper())
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


# %%
if __name__ == "__main__":
    table, found = study(smoke=is_smoke())
    save(HERE, table, found, provenance(HERE, 0, "modelled h100-sxm, h200-sxm, rtx-pro-6000", "sglang-0.5, vllm-v1"))
    if not is_smoke():
        assumptions = what_if(table)
        print(assumptions.to_string(index=False))
        assumptions.to_csv(HERE / "results" / "assumptions.csv", index=False, float_format="%.4g")
        save_figure(HERE, "points", draw_points(table))
        save_figure(HERE, "run", draw_run(replayed()))
