"""What a user brings in one file: a strategy, a policy, an event loop and a cost model."""

from testbed.batch import StepCost


class Alternate:
    """A batching strategy: a prefill, then a decode step, in turns, where there is work for both."""

    def __init__(self):
        self.prefilled = False

    def next_batch(self, scheduler):
        prefill = None if self.prefilled else scheduler.new_prefill_batch(scheduler.chunk_size)
        self.prefilled = prefill is not None
        return prefill or scheduler.decode_batch() or scheduler.new_prefill_batch(scheduler.chunk_size)


def newest_first(waiting, scheduler):
    """A policy: last come, first served."""
    waiting.sort(key=lambda request: -request.rank)


async def double_check(loop):
    """An event loop: the normal one, but it looks at its inbox twice before it decides."""
    while True:
        await loop.recv_requests(block=not loop.scheduler.can_build_batch)
        await loop.recv_requests(block=False)
        batch = loop.get_next_batch_to_run()
        if batch:
            await loop.process_batch_result(batch, await loop.run_batch(batch))
        else:
            loop.self_check_during_idle()


class TokenCost:
    """A cost model: a microsecond a new token, ten a row."""

    def __init__(self, model, device, engine):
        self.device = device

    def price(self, shape):
        return StepCost(1_000 * sum(shape.new_tokens) + 10_000 * shape.decodes, 1, True)

    def price_decode(self, rows, context_tokens, context_max):
        return StepCost(10_000 * rows, 1, True)

    def flops_and_bytes(self, new_tokens, prefix_tokens, decode_rows, context_tokens, rows):
        return 0.0 * rows, 0.0 * rows

    def breakdown(self, shape):
        return {"everything": self.price(shape).gpu_ns}

    def unmeasured(self):
        return ["everything"]
