"""What the projections of a gated MLP are called, and the tensors that store each of their forms. No torch here."""

from __future__ import annotations

import dataclasses
from typing import Any

FORMS = ("dense", "uv", "compact")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class ProjectionSpec:
    """How one matrix is stored: its form, and its rank unless it is `dense`."""

    form: str
    rank: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"form": self.form} if self.rank is None else {"form": self.form, "rank": self.rank}


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


def parameter_count(projection: str, spec: ProjectionSpec, shape: MLPShape) -> int:
    """Numbers stored for the projection in its form."""
    return sum(rows * cols for rows, cols in tensor_shapes(projection, spec, shape).values())
