"""Prefill and decode on engines of their own (``disaggregation:`` of a scenario)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from testbed.scenario.base import Loops, Model, NonNegativeInt, PositiveInt

Bandwidth = Annotated[float, Field(ge=1e-3, le=1e9)]
"""Each of many thousand transfers still gets a share of the slowest link."""
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Microseconds = Annotated[float, Field(ge=0, le=1e15)]
"""Times up to thirty years: 64 bits of nanoseconds hold nine of them."""
Probability = Annotated[float, Field(ge=0, lt=1)]


class Link(Model):
    """The links that keys and values go over, from prefill to decode engines, and what may go wrong on them."""

    gb_per_s: Bandwidth | None = None
    """Of each engine, each way; None: the device's network, once for each device of ``parallel.tp``."""
    latency_us: Microseconds = 10.0
    """Of every message between engines (a guess: RDMA and the work of two processes)."""
    shared_gb_per_s: Bandwidth | None = None
    """Of a link that every transfer passes; None: there is none."""
    loss: Probability = 0.0
    duplicate: Probability = 0.0
    corrupt: Probability = 0.0
    """Of a message: that it is lost, comes twice, or has a bit flipped."""
    jitter_us: Microseconds = 0.0
    """Messages are late by a time that is uniform from 0 to this."""


class Disaggregation(Model):
    """How many engines prefill and decode, and on which terms; each has ``engine`` with its ``parallel.tp`` devices."""

    prefill: Loops = 1
    decode: Loops = 1
    prefill_stages: PositiveInt = 1
    """Pipeline stages of each prefill engine, with ``parallel.tp`` devices each."""
    link: Link = Link()
    bootstrap_timeout_s: Seconds = 300.0
    """A request ends when the other half has not answered for so long (SGLang's 300 s)."""
    transfer_timeout_s: Seconds = 300.0
    """And when its KV has not come by then."""
    reserved_decode_tokens: NonNegativeInt = 512
    """Tokens that a decode engine keeps free for each of its requests (SGLang's ``num_reserved_decode_tokens``)."""
    host_gb_per_s: Bandwidth = 25.0
    """Between a decode device and its host's memory, where the KV of retracted requests waits."""
