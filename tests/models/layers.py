"""Random gated MLPs in every mix of forms and groups, and the plain answer that any sharding must give."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from neuronmlp_plugin.models.definition import Tensors, build_linear, quantize
from neuronmlp_plugin.models.factors import (
    FORMS,
    INT8,
    PROJECTIONS,
    SCALE,
    MLPLayer,
    MLPShape,
    ProjectionSpec,
)

SHAPE = MLPShape(hidden_size=20, intermediate_size=48, num_layers=1)
RANKS = {"gate_proj": 13, "up_proj": 8, "down_proj": 11}
MIXES = list(itertools.product(FORMS, repeat=3))


def mix_layer(
    mix: tuple[str, ...],
    shape: MLPShape = SHAPE,
    *,
    ranks: dict[str, int] = RANKS,
    channels: int | None = None,
    groups: int = 1,
) -> MLPLayer:
    """A layer whose gate, up and down have these forms."""
    specs = {
        p: ProjectionSpec(form, None if form == "dense" else ranks[p])
        for p, form in zip(PROJECTIONS, mix, strict=True)
    }
    return MLPLayer.of(shape, specs, channels=channels, groups=groups)


def in_int8(layer: MLPLayer, projections: tuple[str, ...] = PROJECTIONS) -> MLPLayer:
    """The same layer, with these matrices in int8."""
    return layer.with_specs({p: dataclasses.replace(layer[p], dtype=INT8) for p in projections})


def random_modules(layer: MLPLayer, seed: int = 0) -> dict[str, torch.nn.Module]:
    torch.manual_seed(seed)
    modules = {p: build_linear(matrix) for p, matrix in layer.matrices.items()}
    for module in modules.values():
        for weight in module.parameters():  # a block-diagonal factor is made without contents
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return modules


def stored_tensors(layer: MLPLayer, modules: Mapping[str, torch.nn.Module]) -> dict[str, Tensors]:
    """What FORMAT.md stores of these numbers, by projection and suffix: int8 and scales where the layer says
    so.
    """
    stored = {}
    for name, spec in layer.items():
        tensors = dict(modules[name].state_dict())
        for suffix in list(tensors) if spec.is_int8 else ():
            tensors[suffix], tensors[suffix + SCALE] = quantize(tensors[suffix])
        stored[name] = tensors
    return stored


def plain_mlp(modules: dict[str, torch.nn.Module], x: torch.Tensor) -> torch.Tensor:
    return modules["down_proj"](F.silu(modules["gate_proj"](x)) * modules["up_proj"](x))
