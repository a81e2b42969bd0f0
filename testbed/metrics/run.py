"""A run: what was asked, what was recorded, and the figures that follow from it.

Simulated, paced and real runs are the same thing here; only ``meta["label"]`` tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from testbed.batch import ForwardMode
from testbed.metrics import aggregate, files
from testbed.metrics.aggregate import Sample, SloMark
from testbed.metrics.bootstrap import RESAMPLES
from testbed.metrics.columns import Floats, Ints, floats, ints, request_latencies, token_gaps
from testbed.metrics.laws import merged
from testbed.metrics.loops import capacities
from testbed.metrics.records import Records
from testbed.metrics.table import result_table
from testbed.metrics.window import EmptyWindow, Window, measure_window
from testbed.ports import Stage
from testbed.scenario.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HEADING", "RESAMPLES", "Run"]

HEADING = ("model", "server", "device", "host")
"""Keys of ``meta`` that name what ran, in the order of headings."""


@dataclass(eq=False)
class Run:
    """One run of a scenario.

    ``meta`` says what the records cannot. Keys that are read here, all optional: ``label`` (simulated, paced, real,
    bench), ``model``, ``server`` (its address), ``device``, ``host`` (names of the profiles), ``kv_tokens`` (KV
    capacity of the first loop), ``loops`` (of a run of several: see ``testbed.metrics.loops.Loop``), ``peak_flops`` and
    ``peak_bytes_per_s`` (of one device), ``notes`` (list of str: what is guessed or unmeasured), ``interrupted``
    (somebody ended the run before its workload had), and ``provenance``, a dict of its own for what differs between
    equal runs (command, versions, date, machine).
    """

    scenario: dict[str, Any]
    """The resolved scenario, as plain data."""
    records: Records
    meta: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    """Where the run was saved to or loaded from."""

    def __repr__(self) -> str:
        label = str(self.meta.get("label", ""))
        return f"<Run {self.name!r}{label and f' ({label})'}: {self.records!r}>"

    @property
    def name(self) -> str:
        """The scenario's name."""
        return str(self.scenario.get("name", "scenario"))

    @property
    def decision_digest(self) -> str:
        """SHA-256 of the decision log, in hex: equal digests mean equal decisions."""
        return sha256(self.records.decisions).hexdigest()

    @cached_property
    def requests(self) -> pd.DataFrame:
        """The request records, with ``ttft_ms``, ``tpot_ms`` and ``e2el_ms`` added (NaN where undefined)."""
        import pandas as pd

        latencies = request_latencies(self.records)
        return pd.DataFrame({**self.records.requests, **{f"{name}_ms": latencies[name] for name in latencies}})

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The step records, with columns that follow from them.

        Added: ``mode_name``; ``tokens`` (prompt and decode tokens computed); ``start_delay_ns`` (launch to device
        start); ``idle_before_ns`` (device idle since the step before on the same replica; for the first, since time
        0); ``owned_tokens`` (KV tokens that requests hold, NaN when the capacity is not known).
        """
        import pandas as pd

        table = self.records.steps
        start, end, replica = ints(table, "start_ns"), ints(table, "end_ns"), ints(table, "replica")
        idle = start.copy()
        for which in np.unique(replica):
            mine = np.flatnonzero(replica == which)
            idle[mine[1:]] -= np.maximum.accumulate(end[mine])[:-1]
        names = {mode.value: mode.name.lower() for mode in ForwardMode}
        held = floats(table, "free_tokens") + floats(table, "evictable_tokens")
        return pd.DataFrame(
            {
                **table,
                "mode_name": [names.get(int(mode), "") for mode in ints(table, "mode")],
                "tokens": ints(table, "new_tokens") + ints(table, "decode_rows"),
                "start_delay_ns": start - ints(table, "launch_ns"),
                "idle_before_ns": np.maximum(idle, 0),
                "owned_tokens": capacities(self.records, self.meta) - held,
            }
        )

    @cached_property
    def spans(self) -> pd.DataFrame:
        """The span records, with ``label`` (stage, or forward mode on the device) and ``duration_ns`` added."""
        import pandas as pd

        table = self.records.spans
        names = {(0, stage.value): stage.name.lower() for stage in Stage}
        names |= {(1, mode.value): mode.name.lower() for mode in ForwardMode}
        keys = zip(ints(table, "lane").tolist(), ints(table, "name").tolist(), strict=True)
        duration = ints(table, "end_ns") - ints(table, "begin_ns")
        return pd.DataFrame({**table, "label": [names.get(key, "") for key in keys], "duration_ns": duration})

    def token_times(self, request: int) -> Ints:
        """When request number ``request`` (in order of arrival) sent each of its tokens: int64 [tokens], ns."""
        offsets = self.records.token_offsets
        return self.records.token_times_ns[offsets[request] : offsets[request + 1]]

    def itl_ns(self) -> Ints:
        """Gaps between successive tokens of each request, request after request: int64 [gaps]."""
        return token_gaps(self.records)[0]

    def busy(self, replica: int = 0) -> tuple[Ints, Ints]:
        """Begin and end of the device's busy intervals, disjoint and ascending: int64 [intervals], ns."""
        mine = ints(self.records.steps, "replica") == replica
        return merged(ints(self.records.steps, "start_ns")[mine], ints(self.records.steps, "end_ns")[mine])

    def window(self, measure: Mapping[str, Any] | None = None) -> Window:
        """The window that ``measure`` (default: the scenario's) describes."""
        return measure_window(self.records, self.scenario.get("measure") if measure is None else measure)

    @property
    def percentiles(self) -> tuple[float, ...]:
        """The percentiles that the scenario asks for."""
        return tuple(float(percentile) for percentile in self.scenario.get("percentiles", (50, 90, 95, 99)))

    @property
    def seed(self) -> int:
        """The scenario's seed, which the bootstrap uses too."""
        return int(self.scenario.get("seed", 0))

    def samples(self, measure: Mapping[str, Any] | None = None) -> dict[str, Sample]:
        """TTFT, TPOT, ITL and E2E values (ms) of the requests of the measure window."""
        if measure is not None:
            return aggregate.latency_samples(self.records, self.window(measure))
        return self._samples

    @cached_property
    def _samples(self) -> dict[str, Sample]:
        return aggregate.latency_samples(self.records, self.window())

    def aggregates(
        self,
        percentiles: Sequence[float] | None = None,
        measure: Mapping[str, Any] | None = None,
        slo: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """The figures of the run by key (``docs/metrics.md`` defines each); arguments default to the scenario's."""
        slo = self.scenario.get("slo") if slo is None else slo
        chosen = self.percentiles if percentiles is None else tuple(percentiles)
        return aggregate.aggregates(self.records, self.meta, self.window(measure), chosen, slo)

    def resampled(self, percentiles: Sequence[float] | None = None, seed: int | None = None) -> dict[str, Floats]:
        """Bootstrap distributions of the latency aggregates by key: float64 [1000].

        Two runs of the same requests, resampled with the same seed, are paired.
        """
        window = self.window()
        requests = int(window.holds(ints(self.records.requests, "arrival_ns")).sum())
        chosen = self.percentiles if percentiles is None else tuple(percentiles)
        return aggregate.resampled(self.samples(), requests, chosen, self.seed if seed is None else seed)

    def intervals(
        self, percentiles: Sequence[float] | None = None, level: float = 0.95
    ) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals of the latency aggregates, by the same keys: (low, high)."""
        return aggregate.intervals(self.resampled(percentiles), level)

    def slo_marks(self, slo: Mapping[str, Any] | None = None) -> list[SloMark]:
        """Each limit (default: the scenario's) as (key, limit, value, met)."""
        return aggregate.slo_marks(self.samples(), self.scenario.get("slo") if slo is None else slo)

    def table(self) -> str:
        """The result as one screen of text."""
        heading = {"Scenario": self.name, "Run": str(self.meta.get("label", ""))}
        heading |= {key.capitalize(): str(self.meta[key]) for key in HEADING if key in self.meta}
        heading = {label: words for label, words in heading.items() if words}
        notes = [str(note) for note in self.meta.get("notes", [])]
        return result_table(
            self.aggregates(), self.percentiles, self.slo_marks(), heading, self.records.counters, notes
        )

    def save(self, folder: Path | str, *, parquet: bool | None = None) -> Path:
        """Write the run folder; ``parquet``: None chooses Parquet where pyarrow is installed, else CSV.

        Raises:
            InputError: the folder holds something already.
            EmptyWindow: there are no figures; the folder is written, with null for each of them.
        """
        folder = files.new_folder(Path(folder))
        files.write_yaml(self.scenario, folder / "scenario.resolved.yaml")
        files.write_records(self.records, folder, parquet)
        (folder / "decisions.sha256").write_text(f"{self.decision_digest}  decisions.bin\n", encoding="utf-8")
        meta = {key: value for key, value in self.meta.items() if key != "provenance"}
        empty: EmptyWindow | None = None
        try:
            figures: dict[str, Any] = {**self.aggregates(), "intervals": self.intervals()}
            figures["slo"] = [mark._asdict() for mark in self.slo_marks()]
        except EmptyWindow as error:
            empty = error
            figures = {**dict.fromkeys(self.aggregates(measure={})), "intervals": {}, "slo": []}
        content = {
            "format": files.FORMAT,
            **figures,
            "counters": self.records.counters,
            "decision_digest": self.decision_digest,
            "files": files.digests(folder),
            "meta": meta,
            "provenance": self.meta.get("provenance", {}),
        }
        files.write_json(content, folder / "run.json")
        files.seal(folder)
        self.folder = folder
        if empty is not None:
            raise empty
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Run:
        """Read a run folder.

        Raises:
            InputError: a file is missing or damaged, or the decision log does not match its digest.
        """
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            raise files.unusable("this is not a run folder: it has no run.json", folder)
        content = files.read_json(folder / "run.json")
        if content.get("format") != files.FORMAT:
            raise InputError(
                f"format {content.get('format')!r} of a run folder is not known",
                where=str(folder / "run.json"),
                remedy=f"this version reads format {files.FORMAT}: run the scenario again",
            )
        files.check_seal(folder)
        summary = files.summary(content, folder / "run.json")
        files.check_digests(folder, summary.files)
        scenario = files.read_yaml(folder / "scenario.resolved.yaml")
        records = files.read_records(folder, summary.counters)
        meta = {**summary.meta, "provenance": summary.provenance}
        run = cls(scenario, records, meta, folder)
        digest = files.read_bytes(folder / "decisions.sha256").decode("utf-8", "replace").split()
        if digest[:1] != [run.decision_digest]:
            raise files.unusable("the decision log does not match its digest", folder / "decisions.bin")
        return run
