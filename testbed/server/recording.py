"""A server as a run: what its scheduler recorded, kept until the server ends, and written as a run folder."""

from __future__ import annotations

from testbed.api import run_of
from testbed.deployment import Engine
from testbed.engine.options import DeviceInfo
from testbed.metrics.recorder import Recorder
from testbed.metrics.run import Run
from testbed.request import Request
from testbed.server.forgetful import times_of
from testbed.server.wire import Times


class ServerRecorder(Recorder):
    """Keeps everything; its memory grows with every token."""

    def __init__(self) -> None:
        super().__init__()
        self._sent: dict[str, tuple[int, str, str]] = {}
        """(arrival_ns, session, tenant) by id. Of an id that is used again, its last request is kept."""
        self._times: dict[str, Times] = {}

    def arrived(self, rid: str, sent_ns: int) -> None:
        """A worker has sent this request."""
        self._sent[rid] = sent_ns, "", ""

    def ended(self, request: Request, outputs: int, sent_ns: int) -> None:
        """See Recorder."""
        super().ended(request, outputs, sent_ns)
        self._times[request.rid] = times_of(request, sent_ns)

    def times_of(self, rid: str) -> Times | None:
        """Of a request that has just ended."""
        return self._times.pop(rid, None)

    def run(self, engine: Engine, label: str, info: DeviceInfo | None, command: str) -> Run:
        """The server's life so far. ``command``: what it was started with."""
        sent = dict(sorted(self._sent.items(), key=lambda one: one[1][0]))
        run = run_of([engine], sent, label, info)
        run.meta["provenance"]["command"] = command
        run.meta["notes"].insert(0, "the requests came over HTTP: the workload of the scenario was not sent")
        return run
