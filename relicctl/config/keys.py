"""How keys are defined: their types, limits and meanings, and the checks that sections share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict

from relicctl.errors import UsageError

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]

# YAML has lists only, so a pair itself is not strict; its two numbers are.
Pair = Annotated[tuple[Fraction, Fraction], Strict(False)]
PositivePair = Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False)]
PositiveFloats = Annotated[tuple[PositiveFloat, ...], Strict(False), Field(min_length=1)]
PositiveInts = Annotated[tuple[PositiveInt, ...], Strict(False), Field(min_length=1)]


def key(default: Any, meaning: str, **limits: Any) -> Any:
    """Define a field by its default, its meaning with the unit, and limits of its value."""
    return Field(default, description=meaning, **limits)


class Section(BaseModel):
    """A group of keys: unknown keys are refused and nothing is converted silently; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def check_ranges(ranges: dict[str, tuple[float, float]]) -> None:
    """Raise UsageError for the first key whose pair is not a range above 0."""
    for name, (low, high) in ranges.items():
        if not 0 < low <= high:
            raise UsageError(
                f"{name} is [{low:g}, {high:g}], which is not a range above 0.",
                f"Give {name} as [smallest, largest], both above 0.",
            )
