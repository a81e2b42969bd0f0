"""Why simulation and reality differ: named causes, most important first, each with the figure that shows it.

A finding is made from one join alone and says what to do about it. What makes a run wrong (executor, scheduler) comes
before what makes it another run (interrupted, other memory, other device), then the profiles by the time they explain,
then what keeps anything from being said (noise, few requests).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from testbed.costs import DeviceProfile
from testbed.metrics.columns import completed
from testbed.study.confirm.decisions import ids_by_rank, in_words
from testbed.study.confirm.errors import PERCENTILES, TimeError, time_errors
from testbed.study.confirm.join import Joined

PROFILES = ("device profile", "host profile")
CAVEATS = ("noise", "few requests")
"""Causes that make a run wrong stand before what it agrees in, profiles behind it; caveats are no cause."""
HEADLINE = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms")
"""What a verdict speaks of."""
DEVICE_WRONG_FROM = 0.10
HOST_WRONG_FROM = 0.25
"""A profile's error (of the sum) that is called wrong, where it also exceeds that error's own noise."""
MATTERS_FROM = 0.01
"""Share of the run's time that the error has to be worth."""
NOISY_FROM = 0.05
AGREES_UP_TO = 0.10
"""The largest headline error that still is agreement."""
LEAST_BEYOND = 5
"""Requests that have to lie beyond a percentile for it to say something."""


@dataclass(frozen=True)
class Finding:
    """One named cause."""

    cause: str
    """``executor``, ``scheduler``, ``decisions``, ``interrupted``, ``memory``, ``other device``, ``device profile``,
    ``host profile``, ``noise`` or ``few requests``."""
    place: str
    """Where: a kind of batch, a stage, a request, a step, a figure; '' for the whole."""
    figure: str
    """What shows it, in words and numbers."""
    remedy: str
    factor: float | None = None
    """Of a profile: predicted over measured time."""

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        return f"{self.cause}{place}: {self.figure}"


def find(joined: Joined) -> list[Finding]:
    """Every finding about one variant, most important first; empty when nothing is wrong."""
    profiles = sorted([*_device_profile(joined), *_host_profile(joined)], key=lambda pair: -pair[0])
    return [
        *_executor(joined),
        *_scheduler(joined),
        *_decisions(joined),
        *_interrupted(joined),
        *_memory(joined),
        *_other_device(joined),
        *(finding for _, finding in profiles),
        *_noise(joined),
        *_few_requests(joined),
    ]


def verdict(joined: Joined, findings: list[Finding]) -> str:
    """One line: what a reader has to know first."""
    errors = [joined.figures[key] for key in HEADLINE if not np.isnan(joined.figures[key].error)]
    if not errors:
        return "nothing to compare: no request has completed on both sides"
    worst = max(errors, key=lambda one: abs(one.error))
    told = f"{100 * abs(worst.error):.1f} % ({worst.figure}, noise {100 * worst.noise:.1f} %)"
    below = all(abs(one.error) <= one.noise for one in errors)
    if abs(worst.error) <= AGREES_UP_TO:
        agreement = f"agrees within the noise, {told}" if below else f"agrees within {told}"
    else:
        agreement = f"differs by up to {told}{', within the noise' if below else ''}"
    first = findings[0] if findings and findings[0].cause not in CAVEATS else None
    if first is None:
        return agreement if agreement.startswith("agrees") else f"{agreement}, and no join names a cause"
    cause = f"{first.cause}: {first.figure}"
    return f"{agreement}; {cause}" if first.cause in PROFILES else f"{cause}; {agreement}"


def _executor(joined: Joined) -> Iterator[Finding]:
    seen: set[str] = set()
    for number, faults in enumerate(joined.faults, start=1):
        for fault in faults:
            if fault.kind not in seen:
                seen.add(fault.kind)
                told = f"{fault.told}; {fault.number:,} such in run {number}"
                remedy = "mend the executor: what it returns is not what was asked for"
                yield Finding("executor", f"{fault.kind}, {fault.request}", told, remedy)


def _scheduler(joined: Joined) -> Iterator[Finding]:
    """The first real run that this scheduler would not have made."""
    for number, (run, replayed) in enumerate(zip(joined.real, joined.replayed, strict=True), start=1):
        standing = replayed.divergence
        if standing is not None:
            ids = ids_by_rank(run)
            was, now = in_words(standing.recorded, ids), in_words(standing.replayed, ids)
            told = f"recorded: {was}; decided now: {now}" if was != now else standing.reason
            yield Finding(
                "scheduler",
                f"run {number}, step {standing.step}",
                f"the replay of run {number} diverges at step {standing.step:,}: {told}",
                "another scheduler made the run than this program's; `testbed replay RUN` shows both states",
            )
            return


def _decisions(joined: Joined) -> Iterator[Finding]:
    """A difference that neither timing nor a faulty executor explains, in a run that this scheduler made."""
    for number, found in enumerate(joined.differences, start=1):
        if found is None or found.by_timing or found.cause == "pool":
            continue
        if joined.replayed[number - 1].divergence is None and not joined.faults[number - 1]:
            remedy = "compare what entered both schedulers: `testbed replay RUN --until-step K` of each"
            if joined.real[0].meta.get("label") == "real" and joined.simulated.scenario.get("tokens") != "oracle":
                remedy = "set tokens: oracle, so that the model's own tokens change neither ends nor prefixes"
            yield Finding("decisions", f"run {number}, step {found.step}", found.why, remedy)
            return


def _interrupted(joined: Joined) -> Iterator[Finding]:
    for number, run in enumerate(joined.real, start=1):
        if run.meta.get("interrupted"):
            ended, sent = int(completed(run.records).sum()), len(run.records.requests["id"])
            told = f"run {number} was interrupted: {ended:,} of {sent:,} requests had ended"
            yield Finding("interrupted", f"run {number}", told, "run it to its end: what is missing was the slowest")


def _memory(joined: Joined) -> Iterator[Finding]:
    simulated, real = (run.meta.get("kv_tokens", 0) for run in (joined.simulated, joined.real[0]))
    if simulated != real:
        told = f"simulated with {simulated:,} KV tokens, run with {real:,}"
        yield Finding("memory", "", told, f"set engine.kv_tokens: {min(simulated, real)}")


def _other_device(joined: Joined) -> Iterator[Finding]:
    ran = str(joined.real[0].meta.get("device", ""))
    device = joined.profiles.device
    if joined.real[0].meta.get("label") != "real" or (device is not None and is_profile_of(device, ran)):
        return
    named = "constants of the scenario" if device is None else f"the profile {device.name!r} ({device.device})"
    remedy = "`testbed calibrate` on this machine, then device: DIR/device.yaml"
    yield Finding("other device", ran, f"simulated with {named}, run on {ran}", remedy)


def is_profile_of(device: DeviceProfile, ran: str) -> bool:
    """Whether a profile can be of the device that calls itself ``ran``: its ``device`` is that name, or every word of
    the profile's name that has a digit is in it (h100-sxm: NVIDIA H100 80GB HBM3)."""
    words = [word for word in device.name.lower().split("-") if any(map(str.isdigit, word))]
    return device.device == ran or (bool(words) and all(word in ran.lower() for word in words))


def _device_profile(joined: Joined) -> Iterator[tuple[float, Finding]]:
    """(time at stake in ms, finding) of each kind of batch that is priced wrong."""
    remedy = "`testbed calibrate` on the device that ran, then device: DIR/device.yaml"
    for row in time_errors(joined.steps, ["kind"]):
        if _is_wrong(row, joined, DEVICE_WRONG_FROM):
            sums = f"{row.predicted_ms:,.1f} ms for {row.measured_ms:,.1f} ms in {row.number:,} steps"
            told = f"steps of {row.name} are priced at {row.factor:.3g} times what they take: {sums}"
            yield row.stake_ms, Finding("device profile", row.name, told, remedy, row.factor)


def _host_profile(joined: Joined) -> Iterator[tuple[float, Finding]]:
    """(time at stake in ms, finding) of each stage of the loop that is priced wrong."""
    remedy, asked = "`testbed calibrate` on this machine, then host: DIR/host.yaml", joined.simulated.scenario
    if asked.get("host_inject"):
        same = asked["host_inject"] == asked.get("host")
        remedy = "a quieter or faster machine" if same else "give host and host_inject the same profile"
    for row in time_errors(joined.host, ["stage"]):
        if _is_wrong(row, joined, HOST_WRONG_FROM):
            predicted_us, measured_us = 1e3 * row.predicted_ms / row.number, 1e3 * row.measured_ms / row.number
            told = f"{row.name} is not priced: it takes {measured_us:,.1f} us each"
            if row.predicted_ms:
                each = f"{predicted_us:,.1f} us for {measured_us:,.1f} us each"
                told = f"{row.name} is priced at {row.factor:.3g} times what it takes: {each}"
            yield row.stake_ms, Finding("host profile", row.name, told, remedy, row.factor)


def _is_wrong(row: TimeError, joined: Joined, least: float) -> bool:
    noise = 0.0 if np.isnan(row.noise) else row.noise
    return abs(row.error) > max(least, noise) and row.stake_ms > MATTERS_FROM * joined.real_ms


def _noise(joined: Joined) -> Iterator[Finding]:
    noisy = [joined.figures[key] for key in HEADLINE if joined.figures[key].noise > NOISY_FROM]
    if noisy:
        worst = max(noisy, key=lambda one: one.noise)
        told = f"the same run again differs by {100 * worst.noise:.1f} % in {worst.figure}"
        yield Finding("noise", worst.figure, told, "a quiet machine, a longer workload, or more --repeats")


def _few_requests(joined: Joined) -> Iterator[Finding]:
    requests = min(int(completed(run.records).sum()) for run in (joined.simulated, *joined.real))
    for percentile in PERCENTILES:
        share = (100 - percentile) / 100
        if requests * share < LEAST_BEYOND:
            beyond = f"{requests * share:g} of {requests:,} requests lie beyond p{percentile:g}"
            remedy = f"at least {round(LEAST_BEYOND / share):,} requests"
            yield Finding("few requests", f"p{percentile:g}", f"{beyond}: it and higher ones say little", remedy)
            return
