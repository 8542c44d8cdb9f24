"""Kinds of numbers that configs are made of."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

FORBID_UNKNOWN = ConfigDict(extra="forbid")

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
Even = Annotated[int, Field(ge=2, multiple_of=2)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
