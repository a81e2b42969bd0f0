"""Speed and memory inside ``simulate()``: requests per CPU second, cost of a decode step, growth with the number.

At full size the result is written to ``reports/speed/README.md``.
"""

from __future__ import annotations

from typing import Any

from tests.evidence.evidence import Evidence, commit_page
from tests.evidence.speed import best_of, cpu_name

GIGABYTE = 1e9


def fixed(count: int, rate_per_s: float, prompt: int, output: int, **engine: Any) -> dict[str, Any]:
    """Poisson arrivals of equal requests on one H100."""
    return {
        "model": "llama-3.1-8b",
        "device": "h100-sxm",
        "host": "sglang-0.5",
        "engine": engine,
        "workload": {
            "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s},
            "lengths": {
                "prompt_tokens": {"kind": "fixed", "value": prompt},
                "output_tokens": {"kind": "fixed", "value": output},
            },
            "count": count,
        },
    }


def azure(count: int, model: str, device: str, **engine: Any) -> dict[str, Any]:
    """Lengths of the Azure 2023 conversation trace, Poisson arrivals at 6.45 requests a second."""
    workload = {
        "arrivals": {"kind": "poisson", "rate_per_s": 6.45},
        "lengths": "azure-conv-2023",
        "count": count,
    }
    return {"model": model, "device": device, "host": "sglang-0.5", "engine": engine, "workload": workload}


def at_once(rows: int, output: int) -> dict[str, Any]:
    """All requests at once: after the prefills, pure decode steps of ``rows`` rows."""
    scenario = fixed(rows, 1.0, 128, output, kv_tokens=1_200_000)
    scenario["workload"]["arrivals"] = {"kind": "all_at_once"}
    return scenario


def check(smoke: bool) -> Evidence:
    """Measure, each figure the best of five processes (smoke: of one, a tenth of the size)."""
    times, scale = (1, 10) if smoke else (5, 1)
    lines: list[tuple[str, float, float, bool]] = []  # what, figure, bar, larger is better

    steady = best_of(times, fixed(20_000 // scale, 10.0, 1024, 128))
    lines.append(("1024 in / 128 out at 10/s, H100: requests/CPU s", steady["requests"] / steady["cpu_s"], 2000, True))
    lines.append(("  its peak memory, GB", steady["rss_bytes"] / GIGABYTE, 1.0, False))
    vidur = azure(16_000 // scale, "llama-2-7b", "a100-sxm", batching="stall_free", chunked_prefill_size=512)
    busy = best_of(times, vidur)
    name = "Azure lengths at 6.45/s, Llama-2-7B on A100, chunks of 512 (as Vidur was measured): requests/CPU s"
    lines.append((name, busy["requests"] / busy["cpu_s"], 2700, True))
    light = best_of(times, azure(16_000 // scale, "llama-3.1-8b", "h100-sxm"))
    name = "Azure lengths at 6.45/s, Llama-3.1-8B on H100: requests/CPU s"
    lines.append((name, light["requests"] / light["cpu_s"], 2700, True))
    short, long = (best_of(times, at_once(256, output)) for output in (500, 3500 // (2 if smoke else 1)))
    step_us = (long["cpu_s"] - short["cpu_s"]) / (long["steps"] - short["steps"]) * 1e6
    lines.append(("decode step at batch 256, all in, us", step_us, 20.0, False))

    growth = {n: best_of(1 if smoke else 3, fixed(n, 10.0, 1024, 128)) for n in (1000, 10_000, 100_000)[: 3 - smoke]}
    each = {n: run["cpu_s"] / run["requests"] * 1e6 for n, run in growth.items()}
    worst = max(each.values()) / each[1000]
    lines.append(("CPU a request, the dearest of 1k/10k/100k over that of 1k", worst, 1.15, False))

    reference = min(run["reference_us"] for run in (steady, busy, light, short, long))
    passed = [figure >= bar if larger else figure <= bar for _, figure, bar, larger in lines]
    details = [
        f"{'ok  ' if good else 'MISS'} {what}: {figure:.4g} (bar {'>=' if larger else '<='} {bar:g})"
        for good, (what, figure, bar, larger) in zip(passed, lines, strict=True)
    ]
    details += [f"     CPU us a request at {n}: {cost:.0f}" for n, cost in each.items()]
    details.append(f"     steps a request: {steady['steps'] / steady['requests']:.1f} in the first line")
    details.append(f"     {cpu_name()}; reference loop (1,000 dictionary increments) {reference:.0f} us")
    evidence = Evidence(
        figure=f"{sum(passed)} of {len(passed)} figures reach their bar",
        bar="all",
        passed=all(passed) or smoke,  # time is measured in CI, never asserted
        details=tuple(details),
    )
    if not smoke:
        commit_page("speed", "Speed and memory of simulate()", "simulate.3", evidence)
    return evidence
