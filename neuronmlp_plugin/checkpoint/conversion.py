"""The layout of SVD-LLM and NeuronMM (`*_v_proj` first, `*_u_proj` second), turned into ours. The only place
that knows their letters.
"""

from __future__ import annotations

import pathlib

import torch

from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.schema import FormatBlock, mlp_shape
from neuronmlp_plugin.checkpoint.writer import layer_prefix, write_layer, write_rest
from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.models.factors import DENSE, PROJECTIONS, MLPLayer, MLPShape, ProjectionSpec


def published_names(projection: str) -> dict[str, str]:
    """Our suffix -> their name inside `mlp`. Theirs apply `v` `[R, in]` first and `u` `[out, R]` second; ours
    apply `u` first.
    """
    stem = projection.removesuffix("_proj")
    return {"u.weight": f"{stem}_v_proj.weight", "v.weight": f"{stem}_u_proj.weight"}


def convert_published(source: str | pathlib.Path, target: pathlib.Path) -> FormatBlock:
    """Write `target` (a folder that exists and is empty) from a published folder; ranks are read from the
    shapes.

    Raises CheckpointError where a factor is missing or its shapes do not meet.
    """
    base = Checkpoint(source)
    shape = mlp_shape(base.config, str(base.folder / "config.json"))
    layers = tuple(_published_layer(base, shape, index) for index in range(shape.num_layers))
    if not any(layer.is_low_rank for layer in layers):
        raise CheckpointError(
            f"{base.folder}: expected factors named like model.layers.0.mlp.gate_v_proj.weight, found none."
        )
    block = FormatBlock(layers, shape, {"converted_from": "published v_proj/u_proj layout"})
    for index, layer in enumerate(layers):
        write_layer(target, base, index, _layer_tensors(base, index, layer))
    write_rest(target, base, block)
    Checkpoint(target)  # a rank beyond what the format allows is refused before anyone serves it
    return block


def _published_layer(base: Checkpoint, shape: MLPShape, index: int) -> MLPLayer:
    found = base.shapes()
    specs = {}
    for projection in PROJECTIONS:
        name = f"{layer_prefix(index)}mlp.{published_names(projection)['u.weight']}"
        dense = f"{layer_prefix(index)}mlp.{projection}.weight"
        if name not in found and dense not in found:
            raise CheckpointError(
                f"{base.folder}: expected {name} or {dense}, found neither; the folder is incomplete."
            )
        specs[projection] = ProjectionSpec("uv", found[name][0]) if name in found else DENSE
    return MLPLayer.of(shape, specs)


def _layer_tensors(base: Checkpoint, index: int, layer: MLPLayer) -> dict[str, torch.Tensor]:
    tensors = {}
    for projection, matrix in layer.matrices.items():
        names = {"weight": f"{projection}.weight", **published_names(projection)}
        for suffix, size in matrix.tensor_shapes().items():
            name = f"{layer_prefix(index)}mlp.{names[suffix]}"
            tensor = base.tensor(name)
            if tuple(tensor.shape) != size:
                raise CheckpointError(
                    f"{base.folder}: {name}: expected shape {list(size)}, found {list(tensor.shape)}."
                )
            tensors[f"{layer_prefix(index)}mlp.{projection}.{suffix}"] = tensor
    return tensors
