"""``report.html``: one page that needs nothing else, for one run or for several side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from testbed.metrics.aggregate import LATENCIES
from testbed.metrics.columns import seen_inside
from testbed.metrics.comparison import Figure as Compared
from testbed.metrics.comparison import differences, headline, run_names, shared_percentiles
from testbed.metrics.files import plain
from testbed.metrics.run import HEADING, Run
from testbed.metrics.table import number, parted_notes, percent, percent_more, signed, told_counters
from testbed.report import figures, style
from testbed.report.series import POINTS, time_bins
from testbed.scenario.errors import InputError

MOST_RUNS = 40
"""Runs that one page compares at most."""


@dataclass(frozen=True)
class Plate:
    """A figure on the page."""

    title: str
    """Shown above the figure; '' where the figure's own titles say it all."""
    caption: str
    svg: Markup


def write_report(
    run_or_runs: Run | Sequence[Run],
    folder: Path | str,
    *,
    baseline: int = 0,
    page: str = "report.html",
    title: str = "",
) -> Path:
    """Write the page and, under ``figures/``, each figure as SVG and PNG; returns the page's path.

    A report is derived from its runs: one that is there already is replaced. Several runs make a comparison with
    ``runs[baseline]``, with links to the reports that lie in the runs' own folders. ``title``: default, their names.

    Raises:
        InputError: no run is given, more than a page can show, or the folder cannot be written.
    """
    runs = [run_or_runs] if isinstance(run_or_runs, Run) else list(run_or_runs)
    if not runs:
        raise InputError("a report needs a run")
    if len(runs) > MOST_RUNS:
        remedy = f"A page shows at most {MOST_RUNS}; testbed.study.compare(runs).frame() holds any number."
        raise InputError(f"{len(runs)} runs are too many for one page", remedy=remedy)
    folder = Path(folder)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder: {error.strerror}", where=str(folder)) from error
    content = _single(runs[0], folder) if len(runs) == 1 else _several(runs, baseline, folder)
    template = environment().get_template("report.html")
    target = folder / page
    content |= {"title": title} if title else {}
    target.write_text(template.render(theme=style.THEME, **content) + "\n", encoding="utf-8")
    return target


def environment() -> jinja2.Environment:
    """The templates of pages, and filters for their figures."""
    folder = resources.files("testbed.report").joinpath("templates")
    files = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    made = jinja2.Environment(
        loader=jinja2.DictLoader(files),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["figure"] = number
    made.filters |= {"short": _short, "signed": signed, "percent_more": percent_more, "percent": percent}
    return made


def draw_plate(
    folder: Path, name: str, label: str, caption: str, draw: Callable[[], Figure], *, titled: bool = False
) -> Plate:
    """Draw a figure, write it to ``folder/figures``, and set it in the page; ``label`` is for screen readers."""
    with style.house_style(name):
        figure = draw()
        svg = style.to_svg(figure)
        style.save_figure(figure, folder / "figures", name, svg)
    return Plate(label if titled else "", caption, Markup(style.inline_svg(svg, str(escape(label)))))


def _single(run: Run, folder: Path) -> dict[str, Any]:
    aggregates = run.aggregates()
    return {
        "title": run.name,
        "runs": [_run_facts(run, run.name)],
        "tiles": _tiles(aggregates),
        "marks": run.slo_marks(),
        "latencies": [("", _latency_rows(run, aggregates))],
        "percentiles": [f"p{percentile:g}" for percentile in run.percentiles],
        "sections": _single_sections(run, folder),
        **_notes([run]),
        "comparison": None,
        "pages": [],
        "aggregates": [(key, [value]) for key, value in aggregates.items()],
        "names": [run.name],
    }


def _single_sections(run: Run, folder: Path) -> list[tuple[str, str, list[Plate]]]:
    bins = time_bins(run.records)
    binned = f"Averages over {len(bins.edges_ns) - 1} bins of {_duration(bins.width_s)}."

    def plate(name: str, label: str, caption: str, draw: Callable[[Run], Figure]) -> Plate:
        return draw_plate(folder, name, label, caption, lambda: draw(run))

    latency = [
        draw_plate(
            folder, "latency_cdf", "Latency distributions", _CDF, lambda: figures.latency_cdf([run], [run.name])
        ),
        plate(
            "requests",
            "Where requests spend their time",
            _REQUESTS if seen_inside(run.records) else _FROM_OUTSIDE,
            figures.request_timeline,
        ),
    ]
    if not seen_inside(run.records):
        load = [plate("system", "Requests under way", binned, figures.system_timeline)]
        return [("latency", "Latency", latency), ("load", "Load", load)]
    load = [
        plate("queue", "Running and waiting requests", binned, figures.queue_timeline),
        plate("batch", "Batch composition", f"{_BATCH} {binned}", figures.batch_timeline),
        plate("kv", "KV cache", f"{_KV} {binned}", figures.kv_timeline),
    ]
    points = f"At most {POINTS:,} steps of each mode are drawn, evenly spaced; the run has {len(run.steps):,} steps."
    device = [
        plate("device", "Device time by cause", f"{_DEVICE} {binned}", figures.device_timeline),
        plate("host", "Host time per step", f"{_HOST} {binned}", figures.host_stages),
        plate("steps", "Step time against batch", points, figures.step_scatter),
    ]
    return [("latency", "Latency", latency), ("load", "Load", load), ("device", "Device and host", device)]


_CDF = (
    "Share of values at or below each latency, over the requests that arrived in the measure window; ITL over all gaps."
)
_REQUESTS = (
    "The parts sum to the end-to-end latency. Retracted time is drawn last: records tell how long it was, not when."
)
_FROM_OUTSIDE = "As the client saw it: what is called prefill is all the time to the first token, waiting included."
_BATCH = "Tokens by the forward mode of the step that computed them."
_KV = "Owned: held by requests. Cached: kept for reuse, may be evicted."
_LOAD = f"Averages over time bins. {_KV}"
_DEVICE = "A bubble is idle device time while requests are in the system; without requests there is no work."
_HOST = "Stages of the loop on the host thread, without the wait for the device."


def _several(runs: Sequence[Run], baseline: int, folder: Path) -> dict[str, Any]:
    names = run_names(runs)
    compared = differences(runs, baseline)
    known = {one.metric for one in compared if not np.isnan(one.value)}
    percentiles = shared_percentiles(runs)
    bars = [metric for metric in _bar_metrics(percentiles) if metric in known]
    paired = all(one.paired for one in compared)
    note = (
        "All runs had the same requests, so differences are paired."
        if paired
        else "The measured requests differ between runs, so differences are not paired."
    )
    plates = [
        draw_plate(folder, "compare_bars", "Headline figures", "Lines: 95 % bootstrap intervals. " + note,
               lambda: figures.comparison_bars(compared, bars)),
        draw_plate(folder, "compare_cdf", "Latency distributions", _CDF,
               lambda: figures.latency_cdf(runs, names)),
    ]  # fmt: skip
    numbered = enumerate(zip(runs, names, strict=True), start=1)
    inside = [(index, run, name) for index, (run, name) in numbered if seen_inside(run.records)]
    timelines = [
        draw_plate(folder, f"device_{index}", name, _DEVICE, partial(figures.device_timeline, run), titled=True)
        for index, run, name in inside
    ]
    loads = [
        draw_plate(folder, f"load_{index}", name, _LOAD, partial(figures.load_timeline, run), titled=True)
        for index, run, name in inside
    ]
    sections = [("figures", "Side by side", plates)]
    if inside:
        sections += [("load", "Load of each run", loads), ("device", "Device time of each run", timelines)]
    return {
        "title": " vs. ".join(names) if len(names) <= 3 else f"{len(names)} runs compared",
        "runs": [_run_facts(run, name) for run, name in zip(runs, names, strict=True)],
        "tiles": [],
        "marks": [],
        "latencies": [
            (name, _latency_rows(run, run.aggregates(percentiles), percentiles))
            for run, name in zip(runs, names, strict=True)
        ],
        "percentiles": [f"p{percentile:g}" for percentile in percentiles],
        "sections": sections,
        "pages": [
            (name, address) for run, name in zip(runs, names, strict=True) if (address := _own_page(run, folder))
        ],
        **_notes(runs),
        "comparison": {"rows": _difference_rows(compared, percentiles), "note": note, "baseline": names[baseline]},
        "aggregates": _all_figures(compared),
        "names": names,
    }


def _bar_metrics(percentiles: Sequence[float]) -> tuple[str, ...]:
    """Figures that a comparison draws: means, the highest percentile of each latency, rates and shares."""
    tail = f"p{max(percentiles, default=99):g}"
    return ("mean_ttft_ms", f"{tail}_ttft_ms", "mean_tpot_ms", f"{tail}_tpot_ms", "mean_e2el_ms", f"{tail}_itl_ms",
            "request_goodput", "output_throughput", "device_busy_percent", "bubble_host_percent",
            "mean_batch_size", "kv_use_mean_percent")  # fmt: skip


def _difference_rows(compared: Sequence[Compared], percentiles: Sequence[float]) -> list[tuple[str, list[Compared]]]:
    rows = [(metric, [one for one in compared if one.metric == metric]) for metric in headline(percentiles)]
    return [(metric, cells) for metric, cells in rows if cells and not all(np.isnan(cell.value) for cell in cells)]


def _all_figures(compared: Sequence[Compared]) -> list[tuple[str, list[float]]]:
    table: dict[str, list[float]] = {}
    for one in compared:
        table.setdefault(one.metric, []).append(one.value)
    return list(table.items())


def _tiles(aggregates: Mapping[str, float]) -> list[tuple[str, str, str]]:
    chosen = (
        ("Requests", "request_throughput", "req/s"),
        ("Output", "output_throughput", "tok/s"),
        ("Goodput", "request_goodput", "req/s"),
        ("TTFT p50", "median_ttft_ms", "ms"),
        ("TPOT p50", "median_tpot_ms", "ms"),
        ("Device busy", "device_busy_percent", "%"),
        ("Host bubbles", "bubble_host_percent", "%"),
        ("KV use, peak", "kv_use_peak_percent", "%"),
    )
    return [(label, _short(aggregates[key]), unit) for label, key, unit in chosen if not np.isnan(aggregates[key])]


def _latency_rows(
    run: Run, aggregates: Mapping[str, float], percentiles: Sequence[float] | None = None
) -> list[tuple[str, list[tuple[float, tuple[float, float]]]]]:
    chosen = run.percentiles if percentiles is None else percentiles
    bounds = run.intervals(chosen)
    keys = ["mean", *(f"p{percentile:g}" for percentile in chosen)]
    return [
        (title, [(aggregates[f"{key}_{name}_ms"], bounds[f"{key}_{name}_ms"]) for key in keys])
        for name, title in LATENCIES.items()
    ]


_FACTS = {
    "label": "kind of run",
    "kv_tokens": "KV capacity (tokens)",
    "peak_flops": "device peak (FLOP/s)",
    "peak_bytes_per_s": "device memory bandwidth (bytes/s)",
}


def _run_facts(run: Run, name: str) -> dict[str, Any]:
    meta = {key: value for key, value in run.meta.items() if key not in ("notes", "provenance")}
    window = run.window()
    facts = {
        **{
            _FACTS.get(key, key): f"{value:,.6g}" if isinstance(value, float) else value
            for key, value in meta.items()
            if isinstance(value, str | int | float)
        },
        "seed": run.seed,
        "measure window": f"{window.start_ns / 1e9:g} s to {window.end_ns / 1e9:g} s",
        "requests": len(run.records.requests["id"]),
        **({"decision digest": run.decision_digest} if run.records.decisions else {}),
    }
    engine, loops = run.scenario.get("engine") or {}, run.meta.get("loops") or []
    chosen = {"loop": run.meta.get("loop") or engine.get("loop")}
    chosen |= {key: engine.get(key) for key in ("batching", "policy")}
    how = [f"{key} {value}" for key, value in chosen.items() if value and "server" not in run.meta]
    if loops:
        facts["loops"] = ", ".join(loop["name"] for loop in loops)
        how.append(f"{len(loops)} loops")
        if engine["parallel"]["dp"] > 1:
            how.append(f"routing {run.scenario['routing']['policy']}")
    provenance = {key: plain(value) for key, value in run.meta.get("provenance", {}).items()}
    return {
        "name": name,
        "label": str(run.meta.get("label", "")),
        "subtitle": " · ".join([*(str(run.meta[key]) for key in HEADING if run.meta.get(key)), *how]),
        "facts": facts,
        "provenance": provenance,
        "counters": told_counters(run.records.counters, {}),
        "scenario": _yaml(run.scenario),
    }


def _notes(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What is guessed or unmeasured in any of the runs, and what else is to be known; each said once."""
    guessed, others = parted_notes(str(note) for run in runs for note in run.meta.get("notes", []))
    return {"guessed": guessed, "notes": others}


def _own_page(run: Run, folder: Path) -> str:
    """Relative address of the run's own report, '' where there is none."""
    page = run.folder / "report.html" if run.folder else None
    return quote(Path(os.path.relpath(page, folder)).as_posix()) if page and page.is_file() else ""


def _yaml(content: Mapping[str, Any]) -> str:
    import io

    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    buffer = io.StringIO()
    yaml.dump(plain(content), buffer)
    return buffer.getvalue()


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _short(value: float) -> str:
    """A figure in at most about five characters of digits."""
    if np.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
