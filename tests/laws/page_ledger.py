"""Event loops that keep a ledger of KV pages, as a user's own loops: a built-in loop, its scheduler watched.

Two accounts are kept of the same pages. One follows the counter of owned pages, the other adds up what each request
holds, from its own state. Both change only where the scheduler is called, and each call comes with its time.
"""

from collections import Counter

from testbed.loops.normal import event_loop_normal
from testbed.loops.overlap import event_loop_overlap
from testbed.request import NEVER


class Ledger:
    """``area_ns``: integral of the counter over time; ``held_ns``: page-nanoseconds by request."""

    def __init__(self, scheduler):
        self._scheduler = scheduler
        self._since_ns = 0
        self._counted = 0
        self._held = {}
        self.area_ns = 0
        self.held_ns = Counter()
        self.samples = 0

    def settle(self, now_ns):
        """Close the interval that ends here, then look again."""
        duration_ns = now_ns - self._since_ns
        assert duration_ns >= 0, "time went back"
        self.area_ns += self._counted * duration_ns
        for rid, pages in self._held.items():
            self.held_ns[rid] += pages * duration_ns
        self._since_ns = now_ns
        scheduler = self._scheduler
        self._counted = scheduler.memory.owned_pages
        self._held = {rid: own_pages(scheduler, r) for rid, r in scheduler.requests.items() if r.slot != NEVER}
        self.samples += 1


def own_pages(scheduler, request):
    """Pages of a request that are not the tree's."""
    page = scheduler.config.page_size
    return -(-scheduler.allocated_tokens(request) // page) - request.prefix_tokens // page


LAST: list[Ledger] = []
"""The ledger of the run under way, then of the last one."""


def watch(loop):
    """Settle the ledger after everything that can move a page."""
    scheduler = loop.scheduler
    ledger = Ledger(scheduler)
    LAST[:] = [ledger]
    decide, handle, sent = scheduler.get_next_batch_to_run, scheduler.handle_message, scheduler.outputs_sent

    def get_next_batch_to_run(now_ns):
        batch = decide(now_ns)
        ledger.settle(now_ns)
        return batch

    def handle_message(now_ns, message):
        outputs = handle(now_ns, message)
        ledger.settle(now_ns)
        return outputs

    def outputs_sent(batch, result, ended, sent_ns):
        sent(batch, result, ended, sent_ns)
        ledger.settle(sent_ns)

    scheduler.get_next_batch_to_run = get_next_batch_to_run
    scheduler.handle_message = handle_message
    scheduler.outputs_sent = outputs_sent
    return loop


async def normal(loop):
    await event_loop_normal(watch(loop))


async def overlap(loop):
    await event_loop_overlap(watch(loop))
