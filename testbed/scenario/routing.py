"""How requests are spread over the replicas of a deployment (``routing:`` of a scenario)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from testbed.scenario.base import Model, NonNegativeInt, PluginPath, PositiveInt


class Routing(Model):
    """The router's policy, and what it gets to know. Without effect where there is one replica.

    The thresholds are those of ``cache_aware``, with the defaults of SGLang's router.
    """

    policy: (
        Literal["round_robin", "random", "shortest_queue", "least_tokens", "power_of_two", "cache_aware"] | PluginPath
    ) = "round_robin"
    report_every_steps: PositiveInt = 1
    """A replica reports its load after so many processed steps, and whenever it becomes idle."""
    hears_ends: bool = False
    """Whether the router hears that a request has ended before the next report says so: a proxy, through which the
    answers go, does (SGLang's router); a controller in front of the schedulers does not (SGLang's data parallelism)."""
    cache_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Above this share of its prompt a request goes where its prefix was sent; else to the smallest tree."""
    balance_abs_threshold: NonNegativeInt = 32
    balance_rel_threshold: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0001
    """Out of balance: one replica has more requests than another by the first number, and by the second as a factor.
    Then the shortest queue is chosen."""
    max_tree_tokens: PositiveInt = 1 << 24
    """How much of what was sent to a replica is remembered."""

    @property
    def reads_loads(self) -> bool:
        """Whether the policy looks at what replicas report."""
        return self.policy not in ("round_robin", "random")
