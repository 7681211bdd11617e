"""Random gated MLPs in every mix of forms, and the plain answer that any sharding must give."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from neuronmlp_plugin.models.low_rank_linear import build_linear
from neuronmlp_plugin.models.projection import FORMS, PROJECTIONS, MLPShape, ProjectionSpec

SHAPE = MLPShape(hidden_size=20, intermediate_size=48, num_layers=1)
RANKS = {"gate_proj": 13, "up_proj": 8, "down_proj": 11}
MIXES = list(itertools.product(FORMS, repeat=3))


def mix_specs(mix: tuple[str, ...]) -> dict[str, ProjectionSpec]:
    return {
        p: ProjectionSpec(form, None if form == "dense" else RANKS[p])
        for p, form in zip(PROJECTIONS, mix, strict=True)
    }


def random_modules(
    specs: dict[str, ProjectionSpec], shape: MLPShape = SHAPE, seed: int = 0
) -> dict[str, torch.nn.Module]:
    torch.manual_seed(seed)
    return {p: build_linear(p, spec, shape) for p, spec in specs.items()}


def plain_mlp(modules: dict[str, torch.nn.Module], x: torch.Tensor) -> torch.Tensor:
    return modules["down_proj"](F.silu(modules["gate_proj"](x)) * modules["up_proj"](x))
