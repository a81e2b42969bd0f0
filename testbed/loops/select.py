"""Which loop runs: SGLang's selection (specification A.0), and a clear refusal of loops that do not exist yet."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Literal

from testbed.loops.base import LoopContext
from testbed.loops.decode import event_loop_normal_decode, event_loop_overlap_decode
from testbed.loops.normal import event_loop_normal
from testbed.loops.overlap import event_loop_overlap
from testbed.loops.overlap_suspended import event_loop_overlap_suspended
from testbed.loops.overlap_thread import event_loop_overlap_thread
from testbed.loops.pipeline import event_loop_pipeline, event_loop_pipeline_async
from testbed.loops.prefill import event_loop_normal_prefill, event_loop_overlap_prefill, event_loop_pipeline_prefill
from testbed.scenario.errors import InputError

EventLoop = Callable[[LoopContext], Coroutine[Any, Any, None]]
Role = Literal["null", "prefill", "decode"]

LOOPS: dict[str, EventLoop] = {
    "normal": event_loop_normal,
    "overlap": event_loop_overlap,
    "overlap_thread": event_loop_overlap_thread,
    "overlap_suspended": event_loop_overlap_suspended,
    "pipeline": event_loop_pipeline,
    "pipeline_async": event_loop_pipeline_async,
    "normal_prefill": event_loop_normal_prefill,
    "overlap_prefill": event_loop_overlap_prefill,
    "pipeline_prefill": event_loop_pipeline_prefill,
    "normal_decode": event_loop_normal_decode,
    "overlap_decode": event_loop_overlap_decode,
}


def select_loop(role: Role, pp_size: int, overlap: bool) -> str:
    """The name of the leaf loop for a disaggregation role, a number of pipeline stages and the overlap switch.

    Pipeline parallelism turns overlap off before this table is read (as SGLang does), so ``pp_size > 1`` with
    ``overlap`` never reaches the prefill row.
    """
    overlap = overlap and pp_size == 1
    if role == "null":
        return "pipeline" if pp_size > 1 else "overlap" if overlap else "normal"
    if role == "prefill":
        return "overlap_prefill" if overlap else "pipeline_prefill" if pp_size > 1 else "normal_prefill"
    return "overlap_decode" if overlap else "normal_decode"


def find_loop(name: str, pp_size: int = 1, role: Role = "null") -> tuple[str, EventLoop]:
    """The loop that ``engine.loop`` names: (its resolved name, the coroutine function).

    ``auto`` is overlap where nothing forbids it. Raises InputError for a loop that this version does not have.
    """
    if name == "auto" or (role == "prefill" and pp_size > 1):
        resolved = select_loop(role, pp_size, overlap=True)
    else:
        resolved = name if role == "null" else f"{name}_{role}"
    if resolved.startswith("overlap") and pp_size > 1:
        raise InputError(
            f"the {resolved} loop does not work with pipeline parallelism",
            where="engine.loop",
            remedy="choose loop: auto, or parallel: {pp: 1}",
        )
    loop = LOOPS.get(resolved)
    if loop is None:
        raise InputError(
            f"the event loop {resolved!r} is not available in this version",
            where="engine.loop",
            remedy=f"available: auto, {', '.join(LOOPS)}, or your own as package.module:name",
        )
    return resolved, loop
