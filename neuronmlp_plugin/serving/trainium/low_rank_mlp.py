"""The gated MLP that takes the place of NxDI's `NeuronLlamaMLP`: its contract, and the choice between kernels
and torch by phase.

Every tensor-parallel MLP ends with a sum of y over the ranks: an all-reduce, or under sequence parallelism a
reduce-scatter along the sequence. What else the kernels communicate stands in kernel_path.py.

Torch arithmetic is what the compiler gets where no kernel runs, and what CPUs run. Nothing in it depends on
the rank, because NxDI traces one graph for all of them (sharding.py). A layer that fits the ranks computes
the definition on the rank's own share, and has no collective but the sum of y. Under `gather` there are two
more: an all-gather of the local z of gate and up together, and a reduce-scatter of down's z `[T, R]`. int8 is
multiplied as it is and scaled last, as by NxD's own int8 layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neuronmlp_plugin.models.definition import Linear, block_product, product
from neuronmlp_plugin.models.factors import PROJECTIONS, Matrix, MLPLayer
from neuronmlp_plugin.models.gather import all_gather_together
from neuronmlp_plugin.serving.trainium.dispatch import DECODE, PREFILL, RECORD, Decision
from neuronmlp_plugin.serving.trainium.kernel_path import KernelPath
from neuronmlp_plugin.serving.trainium.sharding import (
    PARTS,
    Parallel,
    even_pivots,
    laid_out_shapes,
    partition_dim,
    torch_reading,
)


class Projection(nn.Module):
    """One projection's slice: `first` meets the input, `second` makes the output (sharding.py); one is None
    where the matrix is dense.
    """

    first: Any
    second: Any

    def __init__(self, matrix: Matrix, share: Matrix | None, parallel: Parallel, int8: bool) -> None:
        super().__init__()
        self.share, gathers = share, share is None
        self.blocks = (1, 1) if share is None else share.blocks
        sizes = laid_out_shapes(matrix, parallel.size, gathers)
        for part in PARTS:
            layer = None
            if part in sizes:
                size, dim = sizes[part], partition_dim(matrix, part, gathers)
                layer = parallel.int8(size, dim, size[:1]) if int8 else parallel.linear(size, dim)
            self.register_module(part, layer)
        self.pivots = even_pivots(matrix, parallel.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the rank's share makes of x: its output channels (gate, up), or a summand of y (down)."""
        assert self.share is not None
        return product(self.share, *self.factors, x)

    @property
    def factors(self) -> tuple[Linear | None, Linear | None]:
        """What multiplies by `first` and by `second`."""
        first, second = map(_multiply, (self.first, self.second), self.blocks)
        return first, second

    def output(self, part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Gate or up under `gather`: this rank's z and all of z -> this rank's output channels `[..., I /
        tp]`.
        """
        _, second = self.factors
        if second is None:
            return part
        if not self.pivots:
            return second(whole)
        return torch.cat((part[..., : self.pivots], second(whole)), dim=-1)


def _multiply(layer: Any, blocks: int) -> Linear | None:
    """A sharded layer as it is, its weight as a stack of blocks, or its int8 weight and scales."""
    if layer is None:
        return None
    if hasattr(layer, "scale"):
        return lambda x: scaled_product(x, layer.weight, layer.scale, blocks)
    return layer if blocks == 1 else lambda x: block_product(x, layer.weight, blocks)


def scaled_product(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, blocks: int) -> torch.Tensor:
    """`block_product` by the weight that q int8 and scale fp32 stand for, in the dtype of x: every int8 is a
    bf16, and what is summed is rounded once more than by an expanded weight.
    """
    return (block_product(x, q.to(x.dtype), blocks) * scale).to(x.dtype)


class TorchPath(nn.Module):
    """`down(silu(gate(x)) * up(x))` of one rank by torch operations."""

    def __init__(self, stored: MLPLayer, parallel: Parallel) -> None:
        super().__init__()
        self.gathers, self.parallel = stored.gathers(parallel.size), parallel
        shares = {} if self.gathers else stored.share(parallel.size).matrices
        int8 = torch_reading(stored, parallel.size, parallel.dtype).int8
        self.gate_proj, self.up_proj, self.down_proj = (
            Projection(stored.matrix(name), shares.get(name), parallel, name in int8) for name in PROJECTIONS
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's summand of y `[..., H]`, from x `[..., H]`."""
        if self.gathers:
            return self._gather(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (p.output(part, whole) for p, part, whole in self._gate_up_z(x))
        h = F.silu(gate) * up
        down, (first, second) = self.down_proj, self.down_proj.factors
        assert second is not None
        if first is None:
            return second(h)
        z = self.parallel.reduce_scatter(first(h[..., down.pivots :]))
        if down.pivots:
            # Behind the reduce-scatter, where a rank's pivots are the first of its own slots on every rank;
            # before it, their place would depend on the rank.
            z = z + F.pad(h[..., : down.pivots], (0, z.shape[-1] - down.pivots))
        return second(z)

    def _gate_up_z(self, x: torch.Tensor) -> list[tuple[Projection, torch.Tensor, torch.Tensor]]:
        """For gate and up: the projection, its local z and its whole z (for a dense one, its local output
        twice).
        """
        projections = (self.gate_proj, self.up_proj)
        firsts = [first for p in projections if (first := p.factors[0]) is not None]  # gate and up have one
        parts = [first(x) for first in firsts]
        wholes = iter(
            all_gather_together(
                [z for p, z in zip(projections, parts, strict=True) if p.second is not None], self.parallel
            )
        )
        return [
            (p, z, z if p.second is None else next(wholes)) for p, z in zip(projections, parts, strict=True)
        ]


SEQUENCE_DIM = 1


class LowRankMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` of one rank, under NxDI's contract for an MLP.

    x is `[B, S, H]`, or `[B, S / tp, H]` under sequence parallelism, and so is the result. `decisions` says
    by phase which path to take; the weights of a path that no phase takes are not allocated. `prefill` is
    None in a module that serves both phases.
    """

    def __init__(
        self,
        stored: MLPLayer,
        parallel: Parallel,
        decisions: Mapping[str, Decision],
        sequence_parallel: bool = False,
        prefill: bool | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        paths = {decision.path for decision in decisions.values()}
        self.torch_path = TorchPath(stored, parallel) if "torch" in paths else None
        self.kernel_path = KernelPath(stored, parallel) if "kernel" in paths else None
        self.parallel, self.decisions = parallel, decisions
        self.sequence_parallel, self.prefill, self.layer = sequence_parallel, prefill, layer

    def forward(
        self,
        x: torch.Tensor,
        rmsnorm: Callable[[torch.Tensor], torch.Tensor] | None = None,
        residual: torch.Tensor | None = None,
        adapter_ids: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(y, residual)`. A given residual is added to x first and the sum returned; `adapter_ids` is
        unused, since LoRA is refused.
        """
        if residual is not None:
            x = residual = residual + x
        if self.sequence_parallel:
            # Normed before it is gathered: a norm sees one token, and so each rank does its share of them.
            x = self.parallel.gather(x if rmsnorm is None else rmsnorm(x), SEQUENCE_DIM)
            rmsnorm = None
        y = self._summand(x, rmsnorm)
        y = (
            self.parallel.scatter_sum(y, SEQUENCE_DIM)
            if self.sequence_parallel
            else self.parallel.all_reduce(y)
        )
        return y, residual

    def _summand(
        self, x: torch.Tensor, rmsnorm: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> torch.Tensor:
        """This rank's summand of y, from the whole x `[B, S, H]`, by the path that was decided for the
        phase.
        """
        prefill = x.shape[1] > 1 if self.prefill is None else self.prefill
        phase = PREFILL if prefill else DECODE
        decision = self.decisions[phase]
        RECORD.add(self.layer, phase, x.shape[0] * x.shape[1], decision)
        if decision.path == "kernel":
            assert self.kernel_path is not None
            return self.kernel_path(x, rmsnorm)
        assert self.torch_path is not None
        return self.torch_path(x if rmsnorm is None else rmsnorm(x))
