"""A small batching server, written for these tests: it fills a run's records consistently, without the engine.

One host thread, one device. An iteration admits waiting requests (one prefill step) or decodes every running one.
"""

from __future__ import annotations

import numpy as np

from testbed.metrics.records import REQUEST_COLUMNS, SPAN_COLUMNS, STEP_COLUMNS, Records
from testbed.metrics.run import Run

TEXT = {"id", "session", "tenant", "finish_reason"}


def exponential(generator, mean, count):
    return -mean * np.log1p(-((generator.random_raw(count) >> np.uint64(11)) / 2.0**53))


class Server:
    def __init__(self, arrivals, prompts, outputs, host_us, max_running, capacity):
        self.arrivals, self.prompts, self.outputs = arrivals, prompts, outputs
        self.host_ns, self.max_running, self.capacity = int(host_us * 1000), max_running, capacity
        self.columns = {name: [] for name in STEP_COLUMNS}
        self.span = {name: [] for name in SPAN_COLUMNS}
        self.table = {name: np.zeros(len(arrivals), np.int64) for name in REQUEST_COLUMNS if name not in TEXT}
        for name in ("queued_ns", "first_scheduled_ns", "first_token_ns", "last_token_ns", "finish_ns"):
            self.table[name][:] = -1
        self.tokens = [[] for _ in arrivals]
        self.running, self.seen, self.now, self.owned = [], 0, 0, 0
        self.waiting = []

    def stage(self, name, duration):
        self.add_span(0, name, self.now, self.now + duration)
        self.now += duration

    def add_span(self, lane, name, begin, end):
        row = (lane, name, len(self.columns["step"]), begin, end, 0)
        for column, value in zip(self.span, row, strict=True):
            self.span[column].append(value)

    def run(self):
        while self.seen < len(self.arrivals) or self.waiting or self.running:
            if not (self.waiting or self.running):
                self.now = max(self.now, int(self.arrivals[self.seen]))
            while self.seen < len(self.arrivals) and self.arrivals[self.seen] <= self.now:
                self.table["queued_ns"][self.seen] = self.now
                self.waiting.append(self.seen)
                self.seen += 1
            self.step()

    def step(self):
        begun = self.now
        self.stage(0, self.host_ns // 8)
        room = self.max_running - len(self.running)
        budget, batch = 8192, []
        while self.waiting and len(batch) < room and self.prompts[self.waiting[0]] <= budget:
            budget -= int(self.prompts[self.waiting[0]])
            batch.append(self.waiting.pop(0))
        self.table["first_scheduled_ns"][batch] = begun
        new = int(sum(self.prompts[request] for request in batch))
        self.owned += new
        rows = batch or self.running
        context = 0 if batch else self.owned
        cost = int(2_000_000 + 60_000 * new / 1000 * 16) if batch else int(4_000_000 + 20_000 * len(rows) + context * 6)
        self.stage(1, self.host_ns * 3 // 8)
        self.stage(2, self.host_ns // 8)
        self.stage(3, self.host_ns // 8)
        start, end = self.now, self.now + cost
        running = len(self.running) + len(batch)
        row = {"step": len(self.columns["step"]), "mode": 1 if batch else 2, "launch_ns": start, "start_ns": start}
        row |= {"end_ns": end, "gpu_ns": cost, "rows": len(rows), "prefill_rows": len(batch), "new_tokens": new}
        row |= {"decode_rows": 0 if batch else len(rows), "context_tokens": context, "running": running}
        row |= {"waiting": len(self.waiting), "free_tokens": self.capacity - self.owned - self.owned // 9}
        row |= {"evictable_tokens": self.owned // 9, "new_token_ratio": 0.5, "graph": 0 if batch else 1}
        row |= {"flops": 16e9 * (new or len(rows)), "bytes": 16e9 + 1e5 * context}
        self.add_span(1, row["mode"], start, end)
        self.stage(5, cost)
        self.stage(6, self.host_ns // 8)
        self.stage(7, self.host_ns // 8)
        for name, column in self.columns.items():
            column.append(row.get(name, 0))
        self.finish(rows)
        self.running = [request for request in self.running + batch if self.table["finish_ns"][request] < 0]

    def finish(self, rows):
        for request in rows:
            self.tokens[request].append(self.now)
            self.owned += 1
            if len(self.tokens[request]) == self.outputs[request]:
                self.table["finish_ns"][request] = self.now
                self.owned -= int(self.prompts[request]) + len(self.tokens[request])

    def records(self):
        table = self.table
        counts = np.array([len(times) for times in self.tokens], np.int64)
        flat = np.array([time for times in self.tokens for time in times], np.int64)
        table["arrival_ns"], table["prompt_tokens"] = self.arrivals, self.prompts
        table["output_tokens"], table["max_new_tokens"] = counts, self.outputs
        table["first_token_ns"] = np.array([times[0] for times in self.tokens], np.int64)
        table["last_token_ns"] = np.array([times[-1] for times in self.tokens], np.int64)
        table["cached_tokens"] = self.prompts // 4
        table["queue_ns"] = table["first_scheduled_ns"] - self.arrivals
        table["prefill_ns"] = table["first_token_ns"] - table["first_scheduled_ns"]
        table["decode_ns"] = table["finish_ns"] - table["first_token_ns"]
        number = len(counts)
        words = {"id": [f"r{i}" for i in range(number)], "session": [""] * number, "tenant": [""] * number}
        words["finish_reason"] = ["length"] * number
        requests = {name: words[name] if name in TEXT else table[name] for name in REQUEST_COLUMNS}
        floats = {"new_token_ratio", "flops", "bytes"}
        steps = {n: np.array(c, np.float64 if n in floats else np.int64) for n, c in self.columns.items()}
        spans = {name: np.array(column, np.int64) for name, column in self.span.items()}
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Records(requests, steps, spans, offsets, flat, b"decisions", {"loop_iterations": len(steps["step"])})


def queue_run(requests=200, rate=20.0, host_us=400, output=32, prompt=500, seed=0, max_running=64, **scenario):
    """A run of Poisson arrivals, ``rate`` a second, with exponential prompts and outputs (means in tokens)."""
    generator = np.random.Philox(key=seed)
    arrivals = np.cumsum(exponential(generator, 1e9 / rate, requests)).astype(np.int64)
    prompts = 1 + np.minimum(exponential(generator, prompt, requests), 8000).astype(np.int64)
    outputs = 1 + exponential(generator, output, requests).astype(np.int64)
    server = Server(arrivals, prompts, outputs, host_us, max_running, capacity=400_000)
    server.run()
    meta = {"label": "simulated", "model": "llama-3.1-8b", "device": "h100-sxm", "host": "testbed"}
    meta |= {"kv_tokens": 400_000, "peak_flops": 989e12, "peak_bytes_per_s": 3.35e12}
    meta |= {"notes": ["The device profile is unmeasured.", "guess: the host time of a step"]}
    meta |= {"provenance": {"command": "testbed simulate scenario.yaml", "date": "2030-01-01"}}
    return Run({"name": f"host {host_us} us", "seed": seed, **scenario}, server.records(), meta)
