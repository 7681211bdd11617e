"""Frozen dataclasses that add, subtract and scale field by field: totals of several launches, and
steady-state extrapolation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

Self = TypeVar("Self", bound="Additive")


@dataclasses.dataclass(frozen=True)
class Additive:
    """Base: every field is a number or itself additive."""

    def _combine(self: Self, other: Self, operation: Callable[[Any, Any], Any]) -> Self:
        names = [field.name for field in dataclasses.fields(self)]
        return type(self)(*(operation(getattr(self, name), getattr(other, name)) for name in names))

    def __add__(self: Self, other: Self) -> Self:
        return self._combine(other, lambda a, b: a + b)

    def __sub__(self: Self, other: Self) -> Self:
        return self._combine(other, lambda a, b: a - b)

    def __mul__(self: Self, count: float) -> Self:
        return self._combine(self, lambda a, _: a * count)
