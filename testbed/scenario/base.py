"""What every part of a scenario is made of: the base model and the constrained numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _stored(number: int) -> int:
    """Records and journals keep 64 bits; sums of two fit into them."""
    if number.bit_length() > 62:
        raise ValueError("a number of more than 62 bits")
    return number


PositiveInt = Annotated[int, Field(gt=0), AfterValidator(_stored)]
NonNegativeInt = Annotated[int, Field(ge=0), AfterValidator(_stored)]
Loops = Annotated[int, Field(gt=0, le=1024)]
"""How many of something that has a loop, a scheduler and memory of its own."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PluginPath = Annotated[str, Field(pattern=r"^[\w./-]+:\w+$", description="package.module:name | path/to/file.py:name")]
"""``package.module:name`` or ``path/to/file.py:name``: the user's own loop, strategy, policy, router or cost model."""


class Model(BaseModel):
    """Base of every part of a scenario: frozen, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
