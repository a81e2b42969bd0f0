"""Event loops that keep what they send, as a user's own loops: a built-in loop with an outbox that is listened to."""

from testbed.loops.normal import event_loop_normal
from testbed.loops.overlap import event_loop_overlap
from testbed.messages import RequestOutput

SENT: dict[str, tuple[int, ...]] = {}
"""Token ids by request, of the run under way or the last one."""


class _Listened:
    def __init__(self, outbox):
        self._outbox = outbox
        self.send_tokens = outbox.send_tokens
        SENT.clear()

    def send(self, output):
        if isinstance(output, RequestOutput):
            assert output.rid not in SENT, "a request ended twice"
            SENT[output.rid] = tuple(output.output_ids.tolist())
        self._outbox.send(output)


async def normal(loop):
    loop.outbox = _Listened(loop.outbox)
    await event_loop_normal(loop)


async def overlap(loop):
    loop.outbox = _Listened(loop.outbox)
    await event_loop_overlap(loop)
