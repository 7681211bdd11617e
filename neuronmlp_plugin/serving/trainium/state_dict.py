"""From the tensors of FORMAT.md to those of the NxDI model, checked by name: NxDI itself would fill a missing
one with random numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from neuronmlp_plugin.checkpoint.reader import Checkpoint, FactorFile, check_names
from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.models.factors import PROJECTIONS, SCALE
from neuronmlp_plugin.serving.trainium.kernel_path import pack_layer
from neuronmlp_plugin.serving.trainium.layout import lay_out

_PREFIX = "model."
State = dict[str, torch.Tensor]


def read_factored(folder: str) -> State:
    """Every tensor of a factored folder, int8 dequantised, by its name in NxDI (without `model.`)."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in Checkpoint(folder).tensors()}


def overlay_factors(state: State, path: str, config: dict[str, Any]) -> None:
    """Put the MLP tensors of a factor file in the place of the dense ones, layer by layer."""
    factors = FactorFile(path, config)
    prefixes = tuple(prefix.removeprefix(_PREFIX) for prefix in factors.prefixes)
    for name in [name for name in state if name.startswith(prefixes)]:
        del state[name]
    for name in factors.block.expected_tensors(only_changed=True):
        state[name.removeprefix(_PREFIX)] = factors.tensor(name)


def cast_int8(state: State, block: FormatBlock, dtype: torch.dtype) -> bool:
    """Bring the weights that were read from int8, in fp32 by now, to the model's dtype, in place; false where
    there are none.
    """
    names = [name.removeprefix(_PREFIX).removesuffix(SCALE) for name in block.expected_scales()]
    state.update({name: state[name].to(dtype) for name in names if name in state})
    return bool(names)


def lay_out_state(state: State, block: FormatBlock, plan: list[set[str]], tp: int, source: str) -> None:
    """Replace all MLP tensors by those of each layer's paths (torch_path.py, kernel_path.py), in place.
    Raises CheckpointError.

    `plan[i]` names the paths that layer i takes in any phase.
    """
    check_names(
        block.expected_tensors(),
        {_PREFIX + n: tuple(t.shape) for n, t in state.items() if ".mlp." in n},
        source,
    )
    for index, (stored, paths) in enumerate(zip(block.layers, plan, strict=True)):
        prefix, gathers = f"layers.{index}.mlp.", stored.gathers(tp)
        weights = {projection: _take(state, f"{prefix}{projection}.") for projection in PROJECTIONS}
        if "torch" in paths:
            for projection, matrix in stored.matrices.items():
                for part, tensor in lay_out(matrix, weights[projection], tp, gathers).items():
                    state[f"{prefix}torch_path.{projection}.{part}.weight"] = tensor.contiguous()
        if "kernel" in paths:
            for stage, tensor in pack_layer(stored, weights, tp).items():
                state[f"{prefix}kernel_path.{stage}.weight"] = tensor
            if gathers:
                state[f"{prefix}kernel_path.rank.rank"] = torch.arange(tp, dtype=torch.int32)


def _take(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
