"""The ``workload:`` part of a scenario: requests from a file, or arrivals and lengths that are drawn.

Alternatives are told apart by ``kind``. A bare number is a fixed value, a bare name a fitted table, and ``lengths``
without a kind draws prompt and output apart. ``docs/workloads.md`` shows an example of each.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from testbed.scenario.base import Model, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

TraceFormat = Literal["auto", "azure", "mooncake", "agent", "burstgpt", "servegen", "lengths", "testbed"]


def _exactly_one(names: str, *given: object) -> None:
    if sum(value is not None for value in given) != 1:
        raise ValueError(f"exactly one of {names} must be given")


# --- distributions: the unit is that of the field they stand in -----------------------------------------------------


class Fixed(Model):
    """Always ``value``; a bare number means the same."""

    kind: Literal["fixed"] = "fixed"
    value: NonNegativeFloat


class Uniform(Model):
    """Evenly spread over ``[low, high]``; of whole numbers both ends are included."""

    kind: Literal["uniform"]
    low: NonNegativeFloat
    high: NonNegativeFloat

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError("low must not be greater than high")
        return self


class _Truncated(Model):
    """A law whose tails can be left out: values outside ``[min, max]`` are never drawn (not piled up at the ends)."""

    min: NonNegativeFloat = 0.0
    max: PositiveFloat | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.max is not None and self.min >= self.max:
            raise ValueError("min must be less than max")
        return self


class Lognormal(_Truncated):
    """The logarithm is normal: ``mean`` or ``median`` with ``sigma`` (of the logarithm), or ``p50`` with ``p95``.

    The parameters describe the law before ``min`` and ``max`` are applied.
    """

    kind: Literal["lognormal"]
    mean: PositiveFloat | None = None
    median: PositiveFloat | None = None
    sigma: PositiveFloat | None = None
    p50: PositiveFloat | None = None
    p95: PositiveFloat | None = None

    @model_validator(mode="after")
    def _parameters(self) -> Self:
        _exactly_one("mean, median and p50", self.mean, self.median, self.p50)
        _exactly_one("sigma and p95", self.sigma, self.p95)
        if (self.p50 is None) != (self.p95 is None):
            raise ValueError("p95 goes with p50; mean and median go with sigma")
        if self.p50 is not None and self.p95 is not None and self.p95 <= self.p50:
            raise ValueError("p95 must be greater than p50")
        return self


class Exponential(_Truncated):
    """Exponential with this ``mean`` (before ``min`` and ``max`` are applied)."""

    kind: Literal["exponential"]
    mean: PositiveFloat


class Empirical(Model):
    """Drawn from data: the rows of a trace ``file``, the fitted table ``name``, or a table of ``quantiles``.

    ``quantiles`` maps ``p0`` .. ``p100`` to values, straight lines between them. ``column`` says which lengths of the
    file or table are meant where the field does not say so itself.
    """

    kind: Literal["empirical"]
    file: str | None = None
    name: str | None = None
    quantiles: dict[Annotated[str, Field(pattern=r"^p(100|\d{1,2}(\.\d+)?)$")], NonNegativeFloat] | None = None
    column: Literal["prompt_tokens", "output_tokens"] | None = None

    @model_validator(mode="after")
    def _source(self) -> Self:
        _exactly_one("file, name and quantiles", self.file, self.name, self.quantiles)
        if self.quantiles is not None:
            points = sorted((float(key[1:]), value) for key, value in self.quantiles.items())
            if not points or points[0][0] != 0.0 or points[-1][0] != 100.0:
                raise ValueError("quantiles must begin with p0 and end with p100")
            if any(low > high for (_, low), (_, high) in pairwise(points)):
                raise ValueError("quantiles must not decrease")
        return self


def _list_is_tuple(value: Any) -> Any:
    """Behind another before-validator a list is Python's, which strict validation refuses where a tuple is declared."""
    return tuple(value) if isinstance(value, list) else value


Listed = BeforeValidator(_list_is_tuple)


def _number_is_fixed(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"kind": "fixed", "value": value} if is_number else value


def _name_is_fitted(value: Any) -> Any:
    return {"kind": "fitted", "name": value} if isinstance(value, str) else value


def _without_kind_is_independent(value: Any) -> Any:
    return {"kind": "independent", **value} if isinstance(value, dict) and "kind" not in value else value


Distribution = Annotated[
    Fixed | Uniform | Lognormal | Exponential | Empirical,
    Field(discriminator="kind"),
    BeforeValidator(_number_is_fixed),
]
"""A number, or a law to draw it from."""


# --- arrivals -------------------------------------------------------------------------------------------------------


class ConstantArrivals(Model):
    """Equal gaps, the first request at 0."""

    kind: Literal["constant"]
    rate_per_s: PositiveFloat


class PoissonArrivals(Model):
    """Exponential gaps, never clipped."""

    kind: Literal["poisson"]
    rate_per_s: PositiveFloat


class GammaArrivals(Model):
    """Gamma gaps with coefficient of variation ``cv`` (1: Poisson; above: burstier)."""

    kind: Literal["gamma"]
    rate_per_s: PositiveFloat
    cv: PositiveFloat


class WeibullArrivals(Model):
    """Weibull gaps with coefficient of variation ``cv``: a heavier tail than gamma's where ``cv`` > 1."""

    kind: Literal["weibull"]
    rate_per_s: PositiveFloat
    cv: Annotated[float, Field(ge=0.01, le=100)]


class BurstArrivals(Model):
    """Poisson at one rate while on, at another while off.

    With ``durations: exponential`` a two-state Markov-modulated Poisson process; with ``fixed`` a square wave. Starts
    on.
    """

    kind: Literal["bursts"]
    on_rate_per_s: PositiveFloat
    off_rate_per_s: NonNegativeFloat = 0.0
    on_s: PositiveFloat
    off_s: PositiveFloat
    durations: Literal["exponential", "fixed"] = "exponential"


class AllAtOnce(Model):
    """Every request at the same instant."""

    kind: Literal["all_at_once"]
    at_s: NonNegativeFloat = 0.0


class ClosedLoop(Model):
    """``users`` who each send, wait for the end, think for ``think_s`` and send again.

    The first requests are spread evenly over ``ramp_s``.
    """

    kind: Literal["closed_loop"]
    users: PositiveInt
    think_s: Distribution = Fixed(value=0)
    ramp_s: NonNegativeFloat = 0.0


class AtIteration(Model):
    """Tied to iterations of the event loop instead of time: the same decisions in both worlds.

    Either a list of ``iterations``, one a request, or ``batch`` requests before every ``every``-th iteration.
    """

    kind: Literal["at_iteration"]
    iterations: Annotated[tuple[NonNegativeInt, ...], Listed] | None = None
    every: PositiveInt | None = None
    batch: PositiveInt = 1

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        _exactly_one("iterations and every", self.iterations, self.every)
        if self.iterations is not None and any(a > b for a, b in pairwise(self.iterations)):
            raise ValueError("iterations must not decrease")
        return self


class FittedArrivals(Model):
    """The fitted table ``name``: gamma gaps under a rate that changes by the minute and repeats after the last one."""

    kind: Literal["fitted"]
    name: str


class Trace(Model):
    """Requests from a file; the format is told from its content. ``trace`` is a path, or a name under TESTBED_DATA."""

    trace: str
    format: TraceFormat = "auto"
    limit: PositiveInt | None = None
    start_s: NonNegativeFloat = 0.0
    """Skip what arrived before."""
    duration_s: PositiveFloat | None = None
    too_long: Literal["reject", "truncate", "drop"] = "reject"
    """Prompt and output together longer than the context: refuse to start, cut the prompt, or leave the request out;
    how many is reported."""
    zero_output: Literal["reject", "drop"] = "reject"
    """A request without output (BurstGPT's failures): refuse to start, or leave it out; how many is reported."""
    jitter_s: NonNegativeFloat = 0.0
    """Spread arrivals that share a time stamp uniformly over this span (Mooncake's are quantised to 3 s)."""


class TraceArrivals(Trace):
    """The arrival times of a trace, without its lengths."""

    kind: Literal["trace"]


Arrivals = Annotated[
    ConstantArrivals
    | PoissonArrivals
    | GammaArrivals
    | WeibullArrivals
    | BurstArrivals
    | AllAtOnce
    | ClosedLoop
    | AtIteration
    | FittedArrivals
    | TraceArrivals,
    Field(discriminator="kind"),
    BeforeValidator(_name_is_fitted),
]
"""When requests come."""


# --- lengths --------------------------------------------------------------------------------------------------------


class IndependentLengths(Model):
    """Prompt and output lengths drawn apart."""

    kind: Literal["independent"] = "independent"
    prompt_tokens: Distribution
    output_tokens: Distribution


class PairLengths(Model):
    """(prompt, output) pairs drawn together, with replacement: the rows of a trace ``file``, or a list."""

    kind: Literal["pairs"]
    file: str | None = None
    pairs: Annotated[tuple[Annotated[tuple[PositiveInt, PositiveInt], Listed], ...], Listed] | None = None

    @model_validator(mode="after")
    def _source(self) -> Self:
        _exactly_one("file and pairs", self.file, self.pairs)
        if self.pairs == ():
            raise ValueError("pairs must not be empty")
        return self


class FittedLengths(Model):
    """The fitted table ``name``: prompt quantiles, and output quantiles by length of the prompt."""

    kind: Literal["fitted"]
    name: str


Lengths = Annotated[
    IndependentLengths | PairLengths | FittedLengths,
    Field(discriminator="kind"),
    BeforeValidator(_without_kind_is_independent),
    BeforeValidator(_name_is_fitted),
]
"""How long prompts and outputs are."""


# --- what prompts share ---------------------------------------------------------------------------------------------


class SubPrefix(Model):
    """A second level: each group's prefix goes on in one of ``groups`` ways."""

    groups: PositiveInt
    prefix_tokens: Distribution
    zipf: NonNegativeFloat = 0.0


class Prefix(SubPrefix):
    """Prompts begin with the prefix of one of ``groups``, *before* the ``prompt_tokens`` of ``lengths``.

    Group k (from 1) is chosen in proportion to ``k ** -zipf`` (0: all alike). ``share`` is the part of the requests
    that have a prefix at all. ``then`` adds a second level under each group.
    """

    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    then: SubPrefix | None = None


class Sessions(Model):
    """Conversations: each arrival is a first turn; the next turn waits for the last and repeats all before it.

    A turn's prompt is the system prompt (``system_tokens``, the same for all), the prefix, every earlier turn with
    its output, and the new text: ``user_tokens`` from the second turn on, else as ``lengths`` says. It arrives
    ``think_s`` after the turn before has ended.
    """

    turns: Distribution
    think_s: Distribution = Fixed(value=0)
    user_tokens: Distribution | None = None
    system_tokens: NonNegativeInt = 0


class Sampling(Model):
    """How the clients of a real run want their tokens drawn; each request has a seed of its own. A modelled device
    does not draw."""

    temperature: NonNegativeFloat = 0.0
    """0: greedy, as benchmark clients ask for."""
    top_k: PositiveInt | Literal[-1] = -1
    """-1: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0


class WorkloadConfig(Model):
    """Requests over time: ``requests`` from a trace, or ``lengths`` with ``arrivals``.

    ``requests`` with ``arrivals`` keeps the file's requests in order and replaces their times.
    """

    requests: Trace | None = None
    arrivals: Arrivals | None = None
    lengths: Lengths | None = None
    prefix: Prefix | None = None
    sessions: Sessions | None = None
    count: PositiveInt | None = None
    """How many requests (sessions, where there are any) are started."""
    duration_s: PositiveFloat | None = None
    """Nothing arrives at or after this time."""
    rate_scale: PositiveFloat = 1.0
    """Arrivals come this much faster; think times stay as they are."""
    max_new_tokens: Literal["output"] | PositiveInt | dict[Literal["ratio"], PositiveFloat] = "output"
    """What the scheduler is told: the true output length, one number for all, or a multiple of the true length."""
    ignore_eos: bool | None = None
    """None: true when ``max_new_tokens`` is ``output``."""
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.requests is None and (self.arrivals is None or self.lengths is None):
            raise ValueError("give requests: {trace: FILE}, or both arrivals and lengths")
        if self.requests is not None:
            for name in ("lengths", "prefix", "sessions"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} cannot be combined with requests: the trace says what is sent")
        if isinstance(self.max_new_tokens, dict) and not self.max_new_tokens:
            raise ValueError("max_new_tokens: {ratio: NUMBER} needs the number")
        if self.sessions is not None and isinstance(self.arrivals, AtIteration):
            raise ValueError("sessions cannot be tied to iterations: a turn waits for the one before")
        return self
