"""From the tensors of FORMAT.md to those of the NxDI model, checked by name: NxDI itself would fill a missing
one with random numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from neuronmlp_plugin.checkpoint.reader import Checkpoint, FactorFile, check_names
from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.models.definition import Weight
from neuronmlp_plugin.models.factors import PROJECTIONS, SCALE
from neuronmlp_plugin.serving.trainium.kernel_path import pack_layer
from neuronmlp_plugin.serving.trainium.sharding import lay_out, torch_reading

_PREFIX = "model."
State = dict[str, torch.Tensor]


def read_factored(folder: str) -> State:
    """Every tensor of a factored folder as it is stored, int8 and scales too, by its name in NxDI (without
    `model.`).
    """
    checkpoint, state = Checkpoint(folder), State()
    for name in checkpoint.names():
        short = name.removeprefix(_PREFIX)
        _put(state, short, checkpoint.weight(name), short + SCALE)
    return state


def _put(state: State, name: str, weight: Weight, scale_name: str) -> None:
    state[name] = weight.values.contiguous()
    if weight.scale is not None:
        state[scale_name] = weight.scale.contiguous()


def overlay_factors(state: State, path: str, config: dict[str, Any]) -> None:
    """Put the MLP tensors of a factor file in the place of the dense ones, layer by layer."""
    factors = FactorFile(path, config)
    prefixes = tuple(prefix.removeprefix(_PREFIX) for prefix in factors.prefixes)
    for name in [name for name in state if name.startswith(prefixes)]:
        del state[name]
    for name in factors.block.expected_tensors(only_changed=True):
        short = name.removeprefix(_PREFIX)
        _put(state, short, factors.weight(name), short + SCALE)


def lay_out_state(
    state: State, block: FormatBlock, plan: list[set[str]], tp: int, dtype: torch.dtype, source: str
) -> None:
    """Replace all MLP tensors by those of each layer's paths (low_rank_mlp.py, kernel_path.py), in place.
    Raises CheckpointError.

    `plan[i]` names the paths that layer i takes in any phase. int8 stays int8, with fp32 scales beside it,
    wherever the path reads it so (sharding.py); elsewhere it is expanded to `dtype`, the model's. NxDI casts
    all that is floating point but for names that end in "scale".
    """
    check_names(
        {**block.expected_tensors(), **block.expected_scales()},
        {_PREFIX + n: tuple(t.shape) for n, t in state.items() if ".mlp." in n},
        source,
    )
    for index, (stored, paths) in enumerate(zip(block.layers, plan, strict=True)):
        prefix, gathers = f"layers.{index}.mlp.", stored.gathers(tp)
        weights = {projection: _take(state, f"{prefix}{projection}.") for projection in PROJECTIONS}
        if "torch" in paths:
            reading = torch_reading(stored, tp, dtype)
            for projection, matrix in stored.matrices.items():
                tensors = reading.tensors(matrix, weights[projection], dtype)
                for part, weight in lay_out(matrix, tensors, tp, gathers).items():
                    name = f"{prefix}torch_path.{projection}.{part}."
                    _put(state, name + "weight", weight, name + "scale")
        if "kernel" in paths:
            for stage, weight in pack_layer(stored, weights, tp, dtype).items():
                name = f"{prefix}kernel_path.{stage}."
                _put(state, name + "weight", weight, name + "scale")
            if gathers:
                # A parameter that NxD slices like a weight, so that each rank finds its own number in it.
                state[f"{prefix}kernel_path.rank.rank"] = torch.arange(tp, dtype=torch.int32)


def _take(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
