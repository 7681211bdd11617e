"""One MLP on this CPU: vLLM's own dense one against the chain that a compressed folder is served by, in
turns.

The layers of a model are its copies: run one after the other, none finds its weights in a near cache. What is
taken is the least processor time of one thread over the rounds, which a busy machine disturbs least.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from neuronmlp_plugin.checkpoint.reader import Checkpoint, dense_block
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.models.definition import Factors, Linear, Weight
from neuronmlp_plugin.models.factors import PROJECTIONS, Matrix

VLLM = "vLLM"  # its prepacked products of the first model, which is dense, with its silu between them


@dataclasses.dataclass(frozen=True)
class MLPTime:
    """`us` of processor time a layer at so many tokens; `speedup` over VLLM in the same run."""

    model: str
    tokens: int
    us: float
    speedup: float


def measure_mlp(
    folders: Mapping[str, pathlib.Path],
    tokens: Sequence[int],
    *,
    dtype: torch.dtype,
    layers: int,
    rounds: int,
    tick: Callable[[int], None],
) -> list[MLPTime]:
    """The first `layers` MLPs of each folder, or all if there are fewer; the first folder is dense. Raises
    UsageError where it is not.
    """
    names = list(folders)
    checkpoints = {name: Checkpoint(folder) for name, folder in folders.items()}
    first = checkpoints[names[0]]
    if first.block is not None:
        raise UsageError(
            f"{first.folder}: expected a dense model as the first one, found a compressed folder."
        )
    torch.set_num_threads(1)
    layers = min(layers, first.config["num_hidden_layers"])
    hidden = first.config["hidden_size"]
    ways = {VLLM: [_vllms(first, index, dtype) for index in range(layers)]}
    ways |= {n: [_ours(c, index, dtype) for index in range(layers)] for n, c in checkpoints.items()}
    results = []
    for count in tokens:
        x, best = torch.randn(count, hidden).to(dtype), dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for name, mlps in ways.items():
                best[name] = min(best[name], _us(mlps, x))
            tick(1)
        results += [MLPTime(name, count, us, best[VLLM] / us) for name, us in best.items()]
    return results


def _us(mlps: list[Linear], x: torch.Tensor) -> float:
    start = time.process_time_ns()
    for mlp in mlps:
        mlp(x)
    return (time.process_time_ns() - start) / len(mlps) / 1e3


def _matrices(checkpoint: Checkpoint, index: int, dtype: torch.dtype) -> list[tuple[Matrix, Factors]]:
    """Gate, up and down of a layer, cast to `dtype` but for int8."""
    block = checkpoint.block or dense_block(checkpoint)
    found = []
    for projection in PROJECTIONS:
        matrix = block.layers[index].matrix(projection)
        name = f"model.layers.{index}.mlp.{projection}."
        weights = [checkpoint.weight(name + suffix) if suffix else None for suffix in matrix.suffixes]
        cast = [w if w is None or w.scale is not None else Weight(w.values.to(dtype)) for w in weights]
        found.append((matrix, Factors(*cast)))
    return found


def _ours(checkpoint: Checkpoint, index: int, dtype: torch.dtype) -> Linear:
    from neuronmlp_plugin.serving.cpu.fused import fused_mlp

    gate, up, down = _matrices(checkpoint, index, dtype)
    return fused_mlp(gate, up, down, dtype)


def _vllms(checkpoint: Checkpoint, index: int, dtype: torch.dtype) -> Linear:
    from neuronmlp_plugin.serving.cpu.gemm import prepacked_linear
    from neuronmlp_plugin.serving.cpu.linear_method import silu_and_mul

    gate, up, down = (
        next(w for w in factors if w is not None).values for _, factors in _matrices(checkpoint, index, dtype)
    )
    gate_up, last = prepacked_linear(torch.cat((gate, up))), prepacked_linear(down)
    return lambda x: last(silu_and_mul(gate_up(x)))
