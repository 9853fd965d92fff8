"""What the configuration tree is made of: ranges, strict nodes, slots for methods."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Files = Annotated[tuple[str, ...], Field(min_length=1)]


class Node(BaseModel):
    """Strict and frozen: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Slot(BaseModel):
    """A method by name (or by import path `package.module:Class`) with the fields of its own config."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str = Field(description="a method, or `package.module:Class`")

    @property
    def fields(self) -> dict[str, object]:
        return dict(self.model_extra or {})
