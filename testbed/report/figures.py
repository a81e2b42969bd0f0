"""The figures of a report. Each takes runs and returns a matplotlib figure; captions live with the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from testbed.batch import ForwardMode
from testbed.metrics.aggregate import LATENCIES, slo_limits
from testbed.metrics.columns import NS_PER_MS, NS_PER_S, Floats, Ints, completed, ints
from testbed.metrics.comparison import Figure as Compared
from testbed.metrics.laws import HOST_LANE, Cause, presence, stays
from testbed.metrics.loops import is_front, loops_of
from testbed.metrics.run import Run
from testbed.ports import Stage
from testbed.report import style
from testbed.report.series import Bins, cause_shares, cumulative, held_mean, level_mean, spread, time_bins

CAUSES = {
    Cause.BUSY: ("busy", style.BLUE),
    Cause.HOST: ("waits for host", style.RED),
    Cause.TRANSFER: ("waits for transfer", style.PURPLE),
    Cause.NO_WORK: ("no work", style.QUIET),
}
PARTS = {
    "queue_ns": ("queue", style.QUIET),
    "prefill_ns": ("prefill", style.ORANGE),
    "transfer_ns": ("transfer", style.PURPLE),
    "decode_ns": ("decode", style.BLUE),
    "retracted_ns": ("retracted", style.RED),
}
SAMPLE = 40
"""Requests in the per-request figure."""
_LINES = ("-", "--", "-.", ":")
"""Line styles of the first, second, ... round through the palette."""
_LOG_FROM = 15
"""A latency axis is logarithmic where p99.5 exceeds p0.5 by this factor."""
_LEAST = 0.001
"""A bar's label and axis tell nothing smaller than this apart from 0."""


def latency_cdf(runs: Sequence[Run], names: Sequence[str]) -> Figure:
    """Distribution of TTFT, TPOT, ITL and E2E latency, the runs overlaid; limits of the SLO as broken lines."""
    columns = max(1, min(4, int(style.WIDTH_IN / (0.5 + 0.075 * max(map(len, names))))))
    figure, panels = style.new_figure(5.6 + 0.2 * (-(-len(runs) // columns) - 1), 2, 2)
    limits = slo_limits(runs[0].scenario.get("slo"))
    for axes, (key, title) in zip(panels, LATENCIES.items(), strict=True):
        everything = []
        for index, (run, name, colour) in enumerate(zip(runs, names, _colours(len(runs)), strict=True)):
            values = run.samples()[key].values_ms
            if len(values):
                line = _LINES[index // len(style.SERIES) % len(_LINES)]
                axes.plot(*cumulative(values), color=colour, label=name, drawstyle="steps-post", linestyle=line)
                everything.append(values)
                if len(runs) == 1:
                    _mark_percentiles(axes, values, run.percentiles, colour)
        for which, limit in [(which, limit) for name, which, limit in limits if name == key]:
            axes.axvline(limit, color=style.RED, linewidth=1.2, linestyle=(0, (4, 2)))
            _note(axes, f"SLO {which}", (limit, 0.05), (4, 0), style.RED)
        axes.set(title=title, xlabel=f"{key.upper()} (ms)", ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        _latency_scale(axes, everything)
    if len(runs) > 1:
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=min(len(labels), columns))
    return figure


def _mark_percentiles(axes: Axes, values: Floats, percentiles: Sequence[float], colour: str) -> None:
    """Mark the lowest and the highest of the percentiles that the run asks for."""
    for percent in [min(percentiles), max(percentiles)][: len(percentiles)] if percentiles else []:
        at = float(np.percentile(values, percent))
        axes.plot([at], [percent / 100], "o", color=colour, markersize=4.5)
        _note(axes, f"p{percent:g}  {_digits(at)} ms", (at, percent / 100), (6, -11))


def _note(axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], colour: str = style.INK) -> None:
    """Small words beside a point of the data, ``shift`` in typographic points."""
    axes.annotate(text, at, xytext=shift, textcoords="offset points", fontsize=8.5, color=colour, va="center")


def _latency_scale(axes: Axes, everything: Sequence[Floats]) -> None:
    if not everything:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=style.MUTED)
        return
    values = np.concatenate(everything)
    low, high = np.percentile(values, [0.5, 99.5])
    if low > 0 and high / low > _LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(right=high * 3)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_xlim(left=0, right=max(high * 1.25, 1e-6))


def batch_timeline(run: Run) -> Figure:
    """Tokens computed a second: prompt tokens above, decode tokens below, by the forward mode that carried them."""
    figure, (prompt, decode) = style.new_figure(3.9, 2, 1, sharex=True)
    bins = time_bins(run.records)
    for axes, column, title in (
        (prompt, "new_tokens", "Prompt tokens computed (tokens/s)"),
        (decode, "decode_rows", "Tokens decoded (tokens/s)"),
    ):
        _stack(axes, bins.centres_s, _token_rates(run, bins, column), style.MODE_COLOURS)
        axes.set(title=title, ylim=(0, None))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        style.legend_above(axes)
    return _time_axis(figure, decode, run)


def _token_rates(run: Run, bins: Bins, column: str) -> dict[str, Floats]:
    """Tokens a second of a step column by forward mode, without the modes that had none: float64 [bins] each."""
    steps = run.records.steps
    mode, start = ints(steps, "mode"), ints(steps, "start_ns")
    tokens = ints(steps, column) * is_front(run.records, run.meta)
    rates = {which.name.lower(): bins.sums(start, tokens * (mode == which)) / bins.width_s for which in ForwardMode}
    return {name: values for name, values in rates.items() if values.any()}


def queue_timeline(run: Run) -> Figure:
    """Requests running and waiting, as the scheduler saw them after each decision."""
    figure, (axes,) = style.new_figure(2.7)
    _draw_queue(axes, run)
    axes.set(title="Requests running and waiting")
    style.legend_above(axes)
    return _time_axis(figure, axes, run)


def system_timeline(run: Run) -> Figure:
    """Requests between arrival and end, which clients see too."""
    figure, (axes,) = style.new_figure(2.7)
    bins = time_bins(run.records)
    since, present = presence(*stays(run.records)["system"])
    values = held_mean(bins, since, present.astype(np.float64))
    axes.fill_between(bins.centres_s, values, color=style.BLUE, alpha=0.13, linewidth=0)
    axes.plot(bins.centres_s, values, color=style.BLUE)
    axes.set(title="Requests sent and not ended", ylim=(0, None))
    return _time_axis(figure, axes, run)


def _draw_queue(axes: Axes, run: Run) -> None:
    bins = time_bins(run.records)
    for column, colour in (("running", style.BLUE), ("waiting", style.ORANGE)):
        values = level_mean(run, bins, column)
        axes.fill_between(bins.centres_s, values, color=colour, alpha=0.13, linewidth=0)
        axes.plot(bins.centres_s, values, color=colour, label=column)
    axes.set(ylim=(0, None))


def kv_timeline(run: Run) -> Figure:
    """KV cache over time: held by requests, cached for reuse, free; tokens, or percent where the capacity is known."""
    figure, (axes,) = style.new_figure(2.7)
    capacity = _draw_kv(axes, run)
    axes.set(title=f"KV cache (% of {capacity:,.0f} tokens; the rest is free)" if capacity else "KV cache (tokens)")
    style.legend_above(axes)
    return _time_axis(figure, axes, run)


def _draw_kv(axes: Axes, run: Run) -> float:
    """Draw the KV cache; returns the capacity of all engines in tokens, 0 where it is not known."""
    bins = time_bins(run.records)
    capacity = sum(loop.kv_tokens for loop in loops_of(run.records, run.meta) if not loop.stage)
    names = {"owned": "owned_tokens", "cached": "evictable_tokens"} if capacity else {
        "cached": "evictable_tokens", "free": "free_tokens"}  # fmt: skip
    scale = 100 / capacity if capacity else 1.0
    parts = {name: scale * level_mean(run, bins, column) for name, column in names.items()}
    _stack(axes, bins.centres_s, parts, {"owned": style.BLUE, "cached": style.SKY, "free": style.QUIET})
    highest = max(float(np.sum(list(parts.values()), axis=0).max(initial=0)), 1e-9)
    axes.set(ylim=(0, 100 if capacity and highest > 50 else highest * 1.15))
    return capacity


def load_timeline(run: Run) -> Figure:
    """Queue, batch composition and KV cache over time in one row: what a comparison shows of each run."""
    figure, panels = style.new_figure(2.5, 1, 3)
    queue, batch, kv = panels
    bins = time_bins(run.records)
    _draw_queue(queue, run)
    prompt, decode = (
        np.sum(list(_token_rates(run, bins, column).values()) or [np.zeros(len(bins.centres_s))], axis=0)
        for column in ("new_tokens", "decode_rows")
    )
    colours = {"prompt": style.ORANGE, "decode": style.BLUE}
    _stack(batch, bins.centres_s, {"decode": decode, "prompt": prompt}, colours)
    batch.set(ylim=(0, None))
    batch.yaxis.set_major_formatter(EngFormatter(sep=""))
    capacity = _draw_kv(kv, run)
    titles = ("Requests", "Tokens computed a second", "KV cache (%)" if capacity else "KV cache (tokens)")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, pad=20)
        style.legend_above(axes, 3)
        _time_axis(figure, axes, run)
    return figure


def device_timeline(run: Run) -> Figure:
    """Where device time went, over time and in all: busy, waiting for the host, for a transfer, without work."""
    figure = style.new_figure(2.9)[0]
    figure.clear()
    axes, whole = figure.subplots(1, 2, width_ratios=(8, 1.25))
    bins = time_bins(run.records)
    shares = {cause: values for cause, values in cause_shares(run, bins).items() if values.any()}
    _stack(axes, bins.centres_s, {CAUSES[c][0]: v for c, v in shares.items()}, dict(CAUSES.values()))
    axes.set(title="Device time by cause (%)", ylim=(0, 100))
    style.legend_above(axes)
    bottom = 0.0
    for cause, values in shares.items():
        share = float((values * np.diff(bins.edges_ns)).sum() / max(bins.edges_ns[-1], 1))
        whole.bar([0], [share], bottom=[bottom], color=CAUSES[cause][1], width=0.9)
        if share > 6:
            dark = cause is Cause.NO_WORK
            whole.text(0, bottom + share / 2, f"{share:.0f} %", ha="center", va="center", fontsize=9,
                       color=style.INK if dark else "#ffffff")  # fmt: skip
        bottom += share
    whole.set(title="Whole run", ylim=(0, 100), xticks=[], yticks=[])
    whole.grid(False)
    whole.spines[:].set_visible(False)
    return _time_axis(figure, axes, run)


def host_stages(run: Run) -> Figure:
    """Host time of a step by stage of the loop, averaged over each time bin; waiting for the device is left out."""
    figure, (axes,) = style.new_figure(2.9)
    bins, spans = time_bins(run.records), run.records.spans
    host = ints(spans, "lane") == HOST_LANE
    begin, end, stage = (ints(spans, name)[host] for name in ("begin_ns", "end_ns", "name"))
    took = end - begin
    steps = np.maximum(bins.sums(ints(run.records.steps, "launch_ns"), np.ones(len(run.steps))), 1)
    parts = {
        which.name.lower(): bins.sums(begin, took * (stage == which)) / steps / 1e3
        for which in Stage
        if which is not Stage.WAIT
    }
    parts = {name: values for name, values in parts.items() if values.any()}
    colours = (*style.SERIES, style.MUTED)  # one for each stage
    _stack(axes, bins.centres_s, parts, dict(zip(parts, colours, strict=False)))
    axes.set(title="Host time per step by stage (us)", ylim=(0, None))
    style.legend_above(axes, 7)
    return _time_axis(figure, axes, run)


def step_scatter(run: Run) -> Figure:
    """Device time of a step against its batch: decodes by rows, steps with prompt tokens by those tokens."""
    figure, (decode, extend) = style.new_figure(3.3, 1, 2)
    steps = run.records.steps
    mode, took = ints(steps, "mode"), ints(steps, "gpu_ns") / NS_PER_MS
    for axes, modes, column, label in (
        (decode, (ForwardMode.DECODE,), "rows", "requests in the batch"),
        (extend, (ForwardMode.EXTEND, ForwardMode.MIXED), "new_tokens", "prompt tokens in the step"),
    ):
        for which in modes:
            mine = np.flatnonzero(mode == which)
            mine = mine[spread(len(mine))]
            if len(mine):
                name = which.name.lower()
                axes.plot(ints(steps, column)[mine], took[mine], "o", color=style.MODE_COLOURS[name], label=name,
                          markersize=3, alpha=0.35, markeredgewidth=0)  # fmt: skip
        axes.set(
            xlabel=label,
            xlim=(0, None),
            ylim=(0, None),
            title=f"Step time: {' and '.join(m.name.lower() for m in modes)} (ms)",
        )
        axes.set_ylim(0, max(float(took[np.isin(mode, modes)].max(initial=0)) * 1.08, 1e-6))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(modes) > 1:
            style.legend_above(axes)
    return figure


def request_timeline(run: Run) -> Figure:
    """What became of a sample of requests, from arrival on. Retracted time stands at the end: when is not recorded."""
    figure, (axes,) = style.new_figure(5.2)
    rows = np.flatnonzero(completed(run.records))
    rows = rows[spread(len(rows), SAMPLE)]
    left = np.zeros(len(rows))
    for column, (name, colour) in PARTS.items():
        width = ints(run.records.requests, column)[rows] / NS_PER_MS
        if width.any():
            axes.barh(np.arange(len(rows)), width, left=left, color=colour, label=name, height=0.78)
        left += width
    output = ints(run.records.requests, "output_tokens")[rows]
    for row, (end, tokens) in enumerate(zip(left, output, strict=True)):
        axes.annotate(str(tokens), (end, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7,
                      color=style.MUTED)  # fmt: skip
    arrivals = ints(run.records.requests, "arrival_ns")[rows] / NS_PER_S
    ticks = np.unique(np.linspace(0, max(len(rows) - 1, 0), min(len(rows), 9)).astype(int))
    axes.set_yticks(ticks, [f"{arrivals[tick]:.1f} s" for tick in ticks])
    axes.set(xlabel="ms since arrival (number at the end: output tokens)", ylabel="arrived at")
    axes.set(title=f"{len(rows)} requests, evenly spaced by arrival", xlim=(0, None))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    style.legend_above(axes)
    return figure


def comparison_bars(figures: Sequence[Compared], metrics: Sequence[str]) -> Figure:
    """Runs beside each other, a panel a metric, with 95 % intervals where there are any; axes start at 0."""
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    by_metric = {metric: [one for one in figures if one.metric == metric] for metric in metrics}
    names = [fill(one.run, 24) for one in by_metric[metrics[0]]]
    each_in = max(0.3, 0.1 + 0.16 * max(name.count("\n") + 1 for name in names))
    figure, panels = style.new_figure(0.7 + rows * (0.75 + each_in * len(names)), rows, columns, sharey=True)
    for axes, metric in zip(panels, metrics, strict=False):
        cells = by_metric[metric]
        values = np.nan_to_num([cell.value for cell in cells])
        ends = np.nan_to_num([cell.interval[1] if cell.interval else 0.0 for cell in cells])
        axes.barh(np.arange(len(names)), values, color=_colours(len(names)), height=0.62)
        for row, cell in enumerate(cells):
            if cell.interval and not np.isnan(cell.interval[0]):
                axes.plot(cell.interval, [row, row], color=style.INK, linewidth=1.4, solid_capstyle="butt")
            top = max(cell.value, cell.interval[1] if cell.interval else 0)
            text = "-" if np.isnan(cell.value) else _digits(cell.value)
            _note(axes, text, (float(np.nan_to_num(top)), row), (4, 0))
        axes.set(
            title=_title(metric),
            yticks=np.arange(len(names)),
            yticklabels=names,
            xlim=(0, max(values.max() * 1.3, ends.max() * 1.2, _LEAST)),
        )
        _bar_ticks(axes, percent=metric.endswith("_percent"))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=style.INK)
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    panels[0].invert_yaxis()
    return figure


def _bar_ticks(axes: Axes, *, percent: bool) -> None:
    """Few ticks; a share's axis goes no further than 100 %, the room beyond is for its label."""
    right = axes.get_xlim()[1]
    last = min(right, 100.0) if percent else right
    ticks = [tick for tick in MaxNLocator(4).tick_values(0, last) if 0 <= tick <= last]
    axes.set_xticks(ticks)
    if percent and right > 100:
        axes.spines["bottom"].set_bounds(0, 100)


def _title(metric: str) -> str:
    words = metric.removesuffix("_ms").removesuffix("_percent").split("_")
    words = [word.upper() if word in LATENCIES or word in ("kv", "mfu") else word for word in words]
    unit = " (ms)" if metric.endswith("_ms") else " (%)" if metric.endswith("_percent") else ""
    unit = unit or {
        "request_throughput": " (req/s)",
        "output_throughput": " (tok/s)",
        "request_goodput": " (req/s)",
    }.get(metric, "")
    text = " ".join(words)
    return text[0].upper() + text[1:] + unit


def _digits(value: float) -> str:
    if 0 < abs(value) < _LEAST:
        return f"< {_LEAST:g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _colours(number: int) -> list[str]:
    return [style.SERIES[index % len(style.SERIES)] for index in range(number)]


def _stack(axes: Axes, x: Floats, parts: Mapping[str, Floats], colours: Mapping[str, str]) -> None:
    if parts and len(x):
        axes.stackplot(x, *parts.values(), labels=list(parts), colors=[colours[name] for name in parts], linewidth=0,
                       step="mid" if len(x) < 60 else None)  # fmt: skip


def _time_axis(figure: Figure, axes: Axes, run: Run) -> Figure:
    edges: Ints = time_bins(run.records).edges_ns
    axes.set(xlabel="time (s)", xlim=(0, float(edges[-1]) / NS_PER_S))
    window = run.window()
    for other in figure.axes:
        if other.get_xlabel() or other.get_shared_x_axes().joined(other, axes):
            for at in (window.start_ns, window.end_ns):
                if edges[0] < at < edges[-1]:
                    other.axvline(at / NS_PER_S, color=style.MUTED, linewidth=1, linestyle=(0, (2, 2)))
    return figure
