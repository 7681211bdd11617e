"""What the projections of a gated MLP are called, and the tensors that store each of their forms. No torch
here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

FORMS = ("dense", "uv", "compact")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
INT8 = "int8"
SCALE = "_scale"  # added to a weight's name: the name of its scales


@dataclasses.dataclass(frozen=True)
class ProjectionSpec:
    """How one matrix is stored: its form, its rank unless it is `dense`, and INT8 as `dtype` unless its
    weights are floating point.
    """

    form: str
    rank: int | None = None
    dtype: str | None = None

    @property
    def is_int8(self) -> bool:
        return self.dtype == INT8

    def to_json(self) -> dict[str, Any]:
        given = {"form": self.form, "rank": self.rank, "dtype": self.dtype}
        return {key: value for key, value in given.items() if value is not None}


DENSE = ProjectionSpec("dense")


@dataclasses.dataclass(frozen=True)
class MLPShape:
    """Sizes of a model's gated MLPs: H hidden, I intermediate, and how many layers have one."""

    hidden_size: int
    intermediate_size: int
    num_layers: int

    def in_out(self, projection: str) -> tuple[int, int]:
        """`(in, out)` of a projection."""
        if projection == "down_proj":
            return self.intermediate_size, self.hidden_size
        return self.hidden_size, self.intermediate_size


def tensor_shapes(projection: str, spec: ProjectionSpec, shape: MLPShape) -> dict[str, tuple[int, int]]:
    """Suffix -> `[out, in]` shape of every tensor that stores the projection (FORMAT.md, "Tensors")."""
    n_in, n_out = shape.in_out(projection)
    if spec.form == "dense":
        return {"weight": (n_out, n_in)}
    rank = spec.rank or 0
    if spec.form == "uv":
        return {"u.weight": (rank, n_in), "v.weight": (n_out, rank)}
    if projection == "down_proj":
        return {"c.weight": (rank, n_in - rank), "v.weight": (n_out, rank)}
    return {"u.weight": (rank, n_in), "c.weight": (n_out - rank, rank)}


def scale_shapes(projection: str, spec: ProjectionSpec, shape: MLPShape) -> dict[str, tuple[int]]:
    """Suffix -> `[out]` shape of the scales beside the projection's weights; none unless it is int8."""
    weights = tensor_shapes(projection, spec, shape) if spec.is_int8 else {}
    return {suffix + SCALE: (size[0],) for suffix, size in weights.items()}


def stored_shapes(projection: str, spec: ProjectionSpec, shape: MLPShape) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of all that is stored for the projection: weights and scales."""
    return {**tensor_shapes(projection, spec, shape), **scale_shapes(projection, spec, shape)}


def parameter_count(projection: str, spec: ProjectionSpec, shape: MLPShape) -> int:
    """Numbers stored for the projection in its form."""
    return sum(rows * cols for rows, cols in tensor_shapes(projection, spec, shape).values())


def weight_bytes(projection: str, spec: ProjectionSpec, shape: MLPShape) -> int:
    """Bytes of the projection as it is served: int8 weights with their fp32 scales, floating-point weights in
    bf16.
    """
    scales = sum(rows for (rows,) in scale_shapes(projection, spec, shape).values())
    return parameter_count(projection, spec, shape) * (1 if spec.is_int8 else 2) + 4 * scales
