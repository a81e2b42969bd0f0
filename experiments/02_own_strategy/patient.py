"""Patient prefill: a batching strategy of one's own, in a file outside the package.

A prefill stalls everybody who is decoding. So let prompts wait until several have come, or the first has waited long
enough, and prefill them in one step: fewer stalls, for a later first token.
"""

PATIENCE_NS = 200_000_000


class Patient:
    """Prefill when ``enough`` requests wait or the oldest has waited ``patience_ns``; else decode."""

    enough = 8
    patience_ns = PATIENCE_NS

    def next_batch(self, scheduler):
        """The next step, or None when there is nothing to do."""
        if self._worth_a_stall(scheduler):
            prefill = scheduler.new_prefill_batch(scheduler.chunk_size)
            if prefill is not None:
                return prefill
        # Nobody left to decode: then a prefill stalls nobody.
        return scheduler.decode_batch() or scheduler.new_prefill_batch(scheduler.chunk_size)

    def _worth_a_stall(self, scheduler):
        waiting = scheduler.waiting
        if scheduler.chunked is not None or len(waiting) >= self.enough:  # half a prompt holds memory for nothing
            return True
        return bool(waiting) and scheduler.now_ns - waiting[0].queued_ns >= self.patience_ns


class VeryPatient(Patient):
    """Waits longer, for more."""

    enough = 32
    patience_ns = 4 * PATIENCE_NS
