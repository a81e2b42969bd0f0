"""Prefill and decode on engines of their own (specification G): what a scheduler has besides when it is one of them."""

from testbed.scheduler.disaggregation.decode import DecodeSide
from testbed.scheduler.disaggregation.prefill import PrefillSide
from testbed.scheduler.disaggregation.rooms import Ending, Outgoing, Poll, Side, Terms

__all__ = ["DecodeSide", "Ending", "Outgoing", "Poll", "PrefillSide", "Side", "Terms"]
