"""What a run leaves behind, as typed columns: the contract between whoever runs and whoever reads.

A simulated, a paced and a real run fill the same columns; all times are integer nanoseconds on one clock that starts
at 0, ``-1`` where something never happened. ``replica``, ``role``, ``stage`` and ``rank`` say where it happened.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from testbed.metrics.journal import Journal

Column = NDArray[np.int64] | NDArray[np.float64] | list[str]

REQUEST_COLUMNS = {
    "id": "the request's id (str)",
    "session": "session id, or '' (str)",
    "tenant": "tenant, or '' (str)",
    "priority": "as sent",
    "arrival_ns": "when it was sent",
    "queued_ns": "when the scheduler had received it: the stamp of the loop iteration that read it",
    "first_scheduled_ns": "start of the loop iteration that first put it into a batch",
    "first_token_ns": "when its first token was sent",
    "last_token_ns": "when its last token was sent",
    "finish_ns": "when its end was sent",
    "prompt_tokens": "length of the prompt",
    "cached_tokens": "prompt tokens found in the prefix cache (first admission only)",
    "output_tokens": "tokens sent",
    "max_new_tokens": "what the scheduler was told",
    "finish_reason": "length, stop, abort or error (str)",
    "retractions": "how often it was retracted",
    "queue_ns": "arrival to first_scheduled",
    "prefill_ns": "first_scheduled to first token (or to the end)",
    "decode_ns": "first token to finish, less retracted_ns",
    "retracted_ns": "from each retraction to the next token",
    "transfer_ns": "KV transfer between roles",
    "replica": "",
}
"""queue + prefill + decode + retracted + transfer = finish - arrival, exactly."""

CLIENT_COLUMNS = {
    "sent_ns": "when the client really sent it (arrival_ns is when it should)",
    "status": "HTTP status of the answer, 0 for none",
    "failure": "how it failed, or '' (str)",
}
"""What else the requests of a run have that was seen from outside (label ``bench``)."""

STEP_COLUMNS = {
    "step": "index of the launch",
    "mode": "ForwardMode: 1 extend, 2 decode, 3 mixed",
    "launch_ns": "host time of the launch",
    "start_ns": "device start",
    "end_ns": "device end",
    "gpu_ns": "device busy time (end - start)",
    "rows": "requests in the batch",
    "prefill_rows": "of them prefilling",
    "new_tokens": "prompt tokens computed",
    "prefix_tokens": "prompt tokens whose KV existed",
    "decode_rows": "rows that decode one token",
    "extra_rows": "decode rows whose token is discarded (the overlap loop's extra step)",
    "context_tokens": "KV tokens read by the decode rows",
    "running": "requests in the running batch after the decision",
    "waiting": "requests in the waiting queue after the decision",
    "free_tokens": "free KV tokens after allocation",
    "evictable_tokens": "cached KV tokens that may be evicted",
    "evicted_tokens": "evicted for this step",
    "retracted": "requests retracted for this step",
    "new_token_ratio": "float64",
    "graph": "1 when launched as one CUDA graph",
    "flops": "model FLOPs of the step (float64; 0 when the cost model does not know)",
    "bytes": "device memory traffic of the step (float64; likewise)",
    "replica": "",
}

SPAN_COLUMNS = {
    "lane": "0 host thread, 1 device, 2 KV transfer to the device",
    "name": "host: Stage (0 receive .. 8 finish); device: ForwardMode (1 extend, 2 decode, 3 mixed)",
    "step": "index of the launch the span belongs to; -1 for a transfer",
    "begin_ns": "",
    "end_ns": "",
    "replica": "",
}


@dataclass(slots=True, repr=False)
class Records:
    """The columns of one run. ``requests`` are in order of arrival."""

    requests: dict[str, Column]
    steps: dict[str, Column]
    spans: dict[str, Column]
    token_offsets: NDArray[np.int64]
    """int64 [requests + 1]: request i sent its tokens at ``token_times_ns[token_offsets[i]:token_offsets[i + 1]]``."""
    token_times_ns: NDArray[np.int64]
    decisions: bytes
    """The decision log (format: ``docs/decision_log.md``)."""
    counters: dict[str, int] = field(default_factory=dict)
    """Whole-run counts: loop iterations, empty iterations, invariant checks by id, evictions, ..."""
    journal: Journal | None = None
    """What entered the scheduler, for ``testbed replay``; None in runs that were made without."""

    def __repr__(self) -> str:
        requests, steps = (len(next(iter(table.values()), ())) for table in (self.requests, self.steps))
        return f"<Records: {requests} requests, {steps} steps, {len(self.token_times_ns)} tokens>"
