"""Scenarios that are queues of the textbook: a device of constant times, a host that costs nothing, one replica.

Each case simulates with several seeds and compares with the closed form. ``CASES`` says how many customers a run has,
in continuous integration and for the committed page.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from testbed import simulate
from testbed.metrics.laws import presence
from testbed.metrics.run import Run
from testbed.workload.draw import Uniforms, exponential
from tests.laws import queues
from tests.laws.statistics import BATCHES, Check, Floats, batch_means, interval, mean_check, means_check

SECOND_NS = 1_000_000_000
SERVICE_NS = 1_000_000
TOKEN_NS = 5_000
"""One token of prefill where service times vary; 200 of them are SERVICE_NS."""
HERE = Path(__file__).parent
ONE_SERVER: dict[str, Any] = {"max_running_requests": 1, "kv_tokens": 4096}


def queue(
    device: dict[str, Any], arrivals: dict[str, Any], lengths: dict[str, Any], count: int, seed: int, **engine: Any
) -> Run:
    """Simulate a device of constant times that no host slows down; prompts are not cut and share nothing."""
    fields = {"loop": "normal", "prefix_cache": "none", "chunked_prefill_size": -1, **ONE_SERVER, **engine}
    return simulate(
        {
            "name": "queue",
            "model": "qwen3-0.6b",
            "device": {"constant": device},
            "host": "none",
            "engine": fields,
            "workload": {"arrivals": arrivals, "lengths": lengths, "count": count},
            "seed": seed,
        }
    )


def poisson(rho: float, mean_service_ns: float = SERVICE_NS) -> dict[str, Any]:
    return {"kind": "poisson", "rate_per_s": rho * SECOND_NS / mean_service_ns}


def column(run: Run, name: str) -> Floats:
    return np.asarray(run.records.requests[name], dtype=np.float64)


def waits(run: Run) -> Floats:
    """Time from arrival to the start of service, in units of SERVICE_NS."""
    return column(run, "queue_ns") / SERVICE_NS


def sojourns(run: Run) -> Floats:
    return (column(run, "finish_ns") - column(run, "arrival_ns")) / SERVICE_NS


def lindley_check(law: str, runs: Sequence[Run]) -> Check:
    """Every wait against the recursion W' = max(0, W + S - gap), in integers (D. V. Lindley, Mathematical Proceedings
    of the Cambridge Philosophical Society 48(2), 1952): what a first-come server does on this very path."""
    furthest = 0
    for run in runs:
        arrival, wait, service = (
            np.asarray(run.records.requests[name], np.int64) for name in ("arrival_ns", "queue_ns", "prefill_ns")
        )
        # Unrolled: the server is free at the running maximum of (arrival - work before it), plus that work.
        before = np.cumsum(service) - service
        begin = np.maximum.accumulate(arrival - before) + before
        furthest = max(furthest, int(np.abs(begin - arrival - wait).max()))
    return Check(law, "furthest wait from Lindley's recursion, ns", 0.0, float(furthest))


def thinned_test(law: str, what: str, samples: Sequence[Floats], cdf: Callable[[Floats], Floats], every: int) -> Check:
    """Kolmogorov and Smirnov's test of every ``every``-th value (so that they are nearly independent)."""
    kept = np.concatenate([each[len(each) // 20 :: every] for each in samples])
    return Check(law, what, np.nan, np.nan, p_value=float(stats.kstest(kept, cdf).pvalue))


# --- one server ------------------------------------------------------------------------------------------------------


def md1(rho: float, count: int, seeds: int) -> list[Check]:
    law = f"M/D/1, rho {rho}"
    fixed = {"prompt_tokens": 1, "output_tokens": 1}
    runs = [queue({"prefill_ns": SERVICE_NS}, poisson(rho), fixed, count, seed) for seed in range(seeds)]
    series = [waits(run) for run in runs]
    seen, averages = zip(*(seen_and_average(run) for run in runs), strict=True)
    return [
        lindley_check(law, runs),
        mean_check(law, "mean wait / s", queues.pollaczek_khinchine(rho, 1.0, rho), series),
        mean_check(law, "P(wait = 0)", 1 - rho, [each == 0 for each in series]),
        means_check(law, "mean number in system", rho + rho**2 / (2 * (1 - rho)), averages),
        means_check(
            law, "PASTA: seen by arrivals - time average", 0.0, [a - b for a, b in zip(seen, averages, strict=True)]
        ),
    ]


def seen_and_average(run: Run) -> tuple[Floats, Floats]:
    """Batch by batch: the number in the system that arrivals find, and its average over time."""
    begin, end = (np.asarray(run.records.requests[name], np.int64) for name in ("arrival_ns", "finish_ns"))
    found = (np.arange(len(begin)) - np.searchsorted(np.sort(end), begin, side="right")).astype(np.float64)
    times, present = presence(begin, end)
    area = np.concatenate([[0], np.cumsum(present[:-1] * np.diff(times))]).astype(np.float64)
    start = int(len(begin) * 0.05)
    size = (len(begin) - start) // BATCHES
    edges = begin[start : start + size * BATCHES + 1 : size].astype(np.float64)
    if len(edges) == BATCHES:
        edges = np.append(edges, float(begin[-1]))
    return batch_means(found), np.diff(np.interp(edges, times, area)) / np.diff(edges)


def mg1_two_classes(count: int, seeds: int) -> list[Check]:
    law, rho = "M/G/1, two classes, rho 0.7", 0.7
    lengths = {"kind": "pairs", "pairs": [[100, 1], [100, 1], [100, 1], [500, 1]]}
    first, second = queues.moments([0.5, 2.5], [3, 1])
    arrivals = poisson(rho, first * SERVICE_NS)
    runs = [queue({"prefill_token_ns": TOKEN_NS}, arrivals, lengths, count, seed) for seed in range(seeds)]
    series = [waits(run) for run in runs]
    theory = queues.pollaczek_khinchine(rho / first, second, rho)
    return [
        lindley_check(law, runs),
        mean_check(law, "mean wait / s", theory, series),
        mean_check(law, "P(wait = 0)", 1 - rho, [each == 0 for each in series]),
    ]


def exponential_lengths(tokens: float = 200) -> dict[str, Any]:
    return {"prompt_tokens": {"kind": "exponential", "mean": tokens, "max": 3500}, "output_tokens": 1}


def mm1(count: int, seeds: int) -> list[Check]:
    law, rho = "M/M/1, rho 0.7", 0.7
    runs = [
        queue({"prefill_token_ns": TOKEN_NS}, poisson(rho), exponential_lengths(), count, seed) for seed in range(seeds)
    ]
    series = [sojourns(run) for run in runs]
    return [
        lindley_check(law, runs),
        mean_check(law, "mean sojourn / s", 1 / (1 - rho), series),
        mean_check(law, "P(wait = 0)", 1 - rho, [waits(run) == 0 for run in runs]),
        thinned_test(law, "sojourn is exponential", series, stats.expon(scale=1 / (1 - rho)).cdf, 200),
    ]


def dd1(count: int, seeds: int) -> list[Check]:
    fixed = {"prompt_tokens": 1, "output_tokens": 1}
    arrivals = {"kind": "constant", "rate_per_s": 0.99 * SECOND_NS / SERVICE_NS}
    run = queue({"prefill_ns": SERVICE_NS}, arrivals, fixed, count, 0)
    return [Check("D/D/1, rho 0.99", "longest wait / s", 0.0, float(waits(run).max()))]


def mm1k(count: int, seeds: int) -> list[Check]:
    rho, queued = 0.9, 4
    law = f"M/M/1/{queued + 1}, rho {rho}"
    refused = []
    for seed in range(seeds):
        run = queue(
            {"prefill_token_ns": TOKEN_NS}, poisson(rho), exponential_lengths(), count, seed, max_queued_requests=queued
        )
        refused.append(np.array([reason == "error" for reason in run.records.requests["finish_reason"]], np.float64))
    return [mean_check(law, "share refused", queues.mm1k_blocking(rho, queued + 1), refused)]


def kingman(count: int, seeds: int) -> list[Check]:
    rho, cv = 0.8, 2.0
    lengths = {"kind": "pairs", "pairs": [[100, 1], [100, 1], [100, 1], [500, 1]]}
    first, second = queues.moments([0.5, 2.5], [3, 1])
    arrivals = {"kind": "gamma", "cv": cv, "rate_per_s": rho * SECOND_NS / (first * SERVICE_NS)}
    runs = [queue({"prefill_token_ns": TOKEN_NS}, arrivals, lengths, count, seed) for seed in range(seeds)]
    bound = queues.kingman(rho / first, (cv * first / rho) ** 2, second - first**2, rho)
    series = [waits(run) for run in runs]
    law = f"GI/G/1, rho {rho}, cv {cv:g}"
    return [
        lindley_check(law, runs),
        mean_check(law, "mean wait / s, Kingman's bound", bound, series, bound=True),
    ]


# --- order of service ------------------------------------------------------------------------------------------------


def cobham(count: int, seeds: int) -> list[Check]:
    """Two classes by request priority, from a trace written here: exponential gaps, two sizes a class."""
    law, rates, sizes = "two priorities, rho 0.8", (0.4, 0.3), ([0.5, 1.5], [0.5, 1.8333333333333333])
    sizes_of = [np.array(each) for each in sizes]
    tokens_of = [np.round(each * SERVICE_NS / TOKEN_NS).astype(np.int64) for each in sizes_of]
    exact = [queues.moments(tokens * TOKEN_NS / SERVICE_NS, [1, 1]) for tokens in tokens_of]
    theory = queues.by_class(rates, [first for first, _ in exact], [second for _, second in exact])
    urgent: list[Floats] = []
    rest: list[Floats] = []
    for seed in range(seeds):
        gaps, which, size = (Uniforms(seed, "cobham", name).take(count) for name in ("gap", "class", "size"))
        arrival_ns = np.cumsum(exponential(SERVICE_NS / sum(rates), gaps)).astype(np.int64)
        is_urgent = which < rates[0] / sum(rates)
        tokens = np.where(is_urgent, tokens_of[0][(size * 2).astype(int)], tokens_of[1][(size * 2).astype(int)])
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "two_classes.csv"
            with trace.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["arrival_ns", "prompt_tokens", "output_tokens", "priority"])
                writer.writerows(zip(arrival_ns, tokens, [1] * count, is_urgent.astype(int), strict=True))
            run = _replay(trace, seed)
        wait = waits(run)
        urgent.append(wait[is_urgent])
        rest.append(wait[~is_urgent])
    return [
        mean_check(law, "mean wait of the first / s", theory[0], urgent),
        mean_check(law, "mean wait of the second / s", theory[1], rest),
    ]


def _replay(trace: Path, seed: int) -> Run:
    engine = {"loop": "normal", "prefix_cache": "none", "chunked_prefill_size": -1, "priority": True, **ONE_SERVER}
    return simulate(
        {
            "name": "queue",
            "model": "qwen3-0.6b",
            "device": {"constant": {"prefill_token_ns": TOKEN_NS}},
            "host": "none",
            "engine": engine,
            "workload": {"requests": {"trace": str(trace)}},
            "seed": seed,
        }
    )


def shortest_first(count: int, seeds: int) -> list[Check]:
    """The user's own policy."""
    law, rho, tokens = "shortest job first (own policy), rho 0.8", 0.8, (60, 160, 380)
    sizes = [each * TOKEN_NS / SERVICE_NS for each in tokens]
    first, _ = queues.moments(sizes, [1, 1, 1])
    rates = [rho / first / 3] * 3
    theory = queues.by_class(rates, sizes, [size**2 for size in sizes])
    lengths = {"kind": "pairs", "pairs": [[each, 1] for each in tokens]}
    policy = f"{HERE / 'shortest_first.py'}:shortest_first"
    device, arrivals = {"prefill_token_ns": TOKEN_NS}, poisson(rho, first * SERVICE_NS)
    runs = [queue(device, arrivals, lengths, count, seed, policy=policy) for seed in range(seeds)]
    return [
        mean_check(
            law, f"mean wait of {each} tokens / s", wait, [waits(r)[column(r, "prompt_tokens") == each] for r in runs]
        )
        for each, wait in zip(tokens, theory, strict=True)
    ]


def longest_output_first(count: int, seeds: int) -> list[Check]:
    """The built-in policy ``lof``; a service is as many decode steps as there are outputs after the first."""
    law, rho, outputs = "longest output first, rho 0.7", 0.7, (6, 2)
    sizes = [float(each - 1) for each in outputs]
    first, _ = queues.moments(sizes, [1, 1])
    theory = queues.by_class([rho / first / 2] * 2, sizes, [size**2 for size in sizes])
    lengths = {"kind": "pairs", "pairs": [[1, each] for each in outputs]}
    device, arrivals = {"decode_ns": SERVICE_NS}, poisson(rho, first * SERVICE_NS)
    runs = [queue(device, arrivals, lengths, count, seed, policy="lof") for seed in range(seeds)]
    return [
        mean_check(
            law, f"mean wait of {each} outputs / s", wait, [waits(r)[column(r, "output_tokens") == each] for r in runs]
        )
        for each, wait in zip(outputs, theory, strict=True)
    ]


# --- batches ---------------------------------------------------------------------------------------------------------


def bulk(count: int, seeds: int) -> list[Check]:
    """A prefill of up to four prompts takes as long as one."""
    largest, rho = 4, 0.8
    fixed = {"prompt_tokens": 1, "output_tokens": 1}
    device, arrivals = {"prefill_ns": SERVICE_NS}, poisson(largest * rho)
    runs = [queue(device, arrivals, fixed, count, seed, max_running_requests=largest) for seed in range(seeds)]
    theory = queues.bulk_wait(largest * rho, 1.0, largest)
    return [mean_check(f"M/D^{largest}/1 in bulk, rho {rho}", "mean wait / s", theory, [waits(run) for run in runs])]


def clocked_steps(law_of_length: str, lengths: dict[str, Any], mean: float, count: int, seeds: int) -> list[Check]:
    """Unlimited places and steps of the same time whatever the batch: M/D/inf looked at on step boundaries."""
    busy = 30.0
    law = f"M/G/inf in clocked steps, {law_of_length} outputs"
    arrivals = {"kind": "poisson", "rate_per_s": busy / mean * SECOND_NS / SERVICE_NS}
    plenty = {"max_running_requests": 400, "kv_tokens": 60_000, "batching": "stall_free", "chunked_prefill_size": 8192}
    device = {"decode_ns": SERVICE_NS}
    means, squares, joins, counts = [], [], [], []
    for seed in range(seeds):
        run = queue(device, arrivals, {"prompt_tokens": 1, **lengths}, count, seed, **plenty)
        steps, arrival = run.records.steps, column(run, "arrival_ns")
        start = np.asarray(steps["start_ns"])
        rows = np.asarray(steps["rows"], np.float64)[(start > arrival[len(arrival) // 20]) & (start < arrival[-1])]
        means.append(rows)
        squares.append((rows - busy) ** 2)
        joins.append(waits(run)[len(arrival) // 20 :])
        counts.append(rows[:: int(4 * mean)])
    return [
        mean_check(law, "mean running", busy, means),
        mean_check(law, "variance of running", busy, squares),
        mean_check(law, "wait to join / step", 0.5, joins),
        poisson_test(law, "running is Poisson", np.concatenate(counts), busy),
        thinned_test(law, "wait to join is uniform", joins, stats.uniform.cdf, 1),
    ]


def poisson_test(law: str, what: str, counts: Floats, mean: float) -> Check:
    """Chi-square over cells of equal probability, nearly."""
    inner = np.unique(stats.poisson.ppf(np.linspace(0, 1, 9)[1:-1], mean))
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    expected = np.diff(stats.poisson.cdf(edges, mean)) * len(counts)
    observed = np.histogram(counts, bins=np.concatenate([[-0.5], inner + 0.5, [1e9]]))[0]
    return Check(law, what, np.nan, np.nan, p_value=float(stats.chisquare(observed, expected).pvalue))


def mdinf(count: int, seeds: int) -> list[Check]:
    fixed = clocked_steps("fixed", {"output_tokens": 20}, 20.0, count, seeds)
    # Rounded to whole tokens, at least one: P(n > k) = exp(-(k + 1/2) / m), so the mean is 1 + a geometric sum.
    scale = 20.0
    mean = 1 + np.exp(-1.5 / scale) / (1 - np.exp(-1 / scale))
    drawn = {"output_tokens": {"kind": "exponential", "mean": scale, "max": 350}}
    return fixed + clocked_steps("exponential", drawn, float(mean), count, seeds)


def processor_sharing(count: int, seeds: int, outputs: tuple[int, int] = (41, 161)) -> list[Check]:
    """A decode step takes as long as it has rows: everybody gets an equal share, in slices of one row's time.

    The first token is free, a request of n outputs brings (n - 1) slices of work. A newcomer waits for the end of the
    step under way before it shares; that wait is left out here, and what remains of the slices is small beside 40.
    """
    law, rho = "M/G/1 processor sharing, rho 0.6", 0.6
    row_ns = 10_000
    sizes = [(each - 1) * row_ns / SERVICE_NS for each in outputs]
    first, _ = queues.moments(sizes, [1, 1])
    engine = {"max_running_requests": 200, "kv_tokens": 40_000, "batching": "stall_free", "chunked_prefill_size": 8192}
    lengths = {"kind": "pairs", "pairs": [[1, each] for each in outputs]}
    arrivals = poisson(rho, first * SERVICE_NS)
    runs = [queue({"decode_row_ns": row_ns}, arrivals, lengths, count, seed, **engine) for seed in range(seeds)]
    slowdowns = [
        [(sojourns(run) - waits(run))[column(run, "output_tokens") == each] / size for run in runs]
        for each, size in zip(outputs, sizes, strict=True)
    ]
    return [
        mean_check(law, f"time in service / size, {each} outputs", 1 / (1 - rho), series)
        for each, series in zip(outputs, slowdowns, strict=True)
    ]


# --- users and caches ------------------------------------------------------------------------------------------------


def interactive(count: int, seeds: int) -> list[Check]:
    """N users, one server: R = N / X - Z exactly, the bounds of asymptotic analysis, and M/M/1//N."""
    checks: list[Check] = []
    fixed = {"prompt_tokens": 1, "output_tokens": 1}
    for users, think_s in ((1, 0.0), (4, 0.0), (4, 0.01), (12, 0.01)):
        law = f"closed loop, {users} users, think {think_s * 1000:g} ms"
        arrivals = {"kind": "closed_loop", "users": users, "think_s": think_s}
        run = queue({"prefill_ns": SERVICE_NS}, arrivals, fixed, min(count, 3000), 0)
        begin, end = (np.asarray(run.records.requests[name], np.int64) for name in ("arrival_ns", "finish_ns"))
        until = int(begin.max())
        in_system = int((np.minimum(end, until) - begin).sum())
        back = np.minimum(end, until)
        thinking = int((np.minimum(back + round(think_s * SECOND_NS), until) - back).sum())
        checks.append(Check(law, "N T = sum of R + sum of Z, ns", users * until, in_system + thinking))
        throughput = len(begin) / end.max() * SERVICE_NS
        limit = min(users / (1 + think_s * SECOND_NS / SERVICE_NS), 1.0)
        # The last answers have no think time behind them: at most one more request a user than the law has.
        checks.append(Check(law, "throughput * s", limit + users * SERVICE_NS / end.max(), throughput, bound=True))
        shortest = max(1.0, users - think_s * SECOND_NS / SERVICE_NS)
        later = sojourns(run)[users:]  # the first of each user found nobody in the system
        checks.append(Check(law, "-(mean sojourn / s)", -shortest, -float(later.mean()), bound=True))
    users, think = 6, 5.0
    arrivals = {
        "kind": "closed_loop",
        "users": users,
        "think_s": {"kind": "exponential", "mean": think * SERVICE_NS / SECOND_NS},
    }
    throughputs = []
    for seed in range(seeds):
        run = queue({"prefill_token_ns": TOKEN_NS}, arrivals, exponential_lengths(), count, seed)
        throughputs.append(np.diff(np.sort(column(run, "finish_ns"))) / SERVICE_NS)
    theory = 1 / queues.repairman_throughput(users, 1.0, think)
    checks.append(mean_check(f"M/M/1//{users}", "time between ends / s", theory, throughputs))
    return checks


def lru_cache(count: int, seeds: int) -> list[Check]:
    """Prompts of one shared page and one token, popularity by Zipf's law: the radix tree is an LRU cache of pages."""
    groups, page, places, exponent = 500, 16, 100, 0.9
    popularity = np.arange(1, groups + 1) ** -exponent
    popularity /= popularity.sum()
    hits, exact = [], []
    for seed in range(seeds):
        run = _shared_pages(groups, page, places, exponent, count, seed)
        hit = (column(run, "cached_tokens") > 0).astype(np.float64)
        hits.append(hit)
        references = _groups_drawn(groups, exponent, count, seed)
        exact.append(queues.lru_hits(references, places) - int(hit.sum()))
    law = f"LRU, {groups} prompts, {places} places"
    che = queues.che_hit_rate(popularity, places)
    found, noise = interval([batch_means(each) for each in hits])
    return [
        Check(law, "hits of a naive cache - hits of the tree", 0.0, float(np.abs(exact).max())),
        # An approximation, not a law: one point is allowed beside the interval.
        Check(law, "hit rate, Che's approximation", che, found, half_width=noise + 0.01),
    ]


def _shared_pages(groups: int, page: int, places: int, exponent: float, count: int, seed: int) -> Run:
    """A request needs two pages of its own while it runs; what it leaves is its first."""
    return simulate(
        {
            "name": "queue",
            "model": "qwen3-0.6b",
            "device": {"constant": {"prefill_ns": SERVICE_NS}},
            "host": "none",
            "engine": {
                "loop": "normal",
                "page_size": page,
                "kv_tokens": (places + 2) * page,
                "max_running_requests": 1,
            },
            "workload": {
                "arrivals": {"kind": "constant", "rate_per_s": 0.9 * SECOND_NS / SERVICE_NS},
                "lengths": {"prompt_tokens": 1, "output_tokens": 1},
                "prefix": {"groups": groups, "prefix_tokens": page, "zipf": exponent},
                "count": count,
            },
            "seed": seed,
        }
    )


def _groups_drawn(groups: int, exponent: float, count: int, seed: int) -> list[int]:
    """The groups in order of arrival, from the workload's own generator."""
    weights = np.arange(1, groups + 1, dtype=np.float64) ** -exponent
    popularity = np.cumsum(weights) / weights.sum()
    return np.searchsorted(popularity, Uniforms(seed, "prefix", "group").take(count)).tolist()


# --- sizes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A closed form and how large its simulations are: (customers a run, runs)."""

    name: str
    checks: Callable[[int, int], list[Check]]
    smoke: tuple[int, int]
    full: tuple[int, int]


CASES = (
    Case("md1_07", lambda n, seeds: md1(0.7, n, seeds), (6_000, 1), (200_000, 5)),
    Case("md1_09", lambda n, seeds: md1(0.9, n, seeds), (12_000, 1), (200_000, 5)),
    Case("mg1", mg1_two_classes, (5_000, 1), (100_000, 5)),
    Case("mm1", mm1, (6_000, 1), (100_000, 5)),
    Case("dd1", dd1, (1_000, 1), (10_000, 1)),
    Case("mm1k", mm1k, (4_000, 1), (50_000, 5)),
    Case("kingman", kingman, (12_000, 1), (100_000, 5)),
    Case("cobham", cobham, (5_000, 1), (100_000, 5)),
    Case("shortest_first", shortest_first, (5_000, 1), (100_000, 5)),
    Case("longest_output_first", longest_output_first, (3_000, 1), (50_000, 5)),
    Case("bulk", bulk, (5_000, 1), (100_000, 5)),
    Case("mdinf", mdinf, (3_000, 1), (50_000, 5)),
    Case("processor_sharing", processor_sharing, (800, 1), (10_000, 5)),
    Case("interactive", interactive, (3_000, 1), (50_000, 5)),
    Case("lru_cache", lru_cache, (5_000, 1), (50_000, 5)),
)
