"""The MLP's plain torch arithmetic of one rank, and its collectives: what the compiler gets where no kernel
runs, and what CPUs run.

Nothing here depends on the rank, because NxDI traces one graph for all of them (layout.py). Per MLP, besides
the sum of y (mlp.py):
`gather` - one all-gather of the local z of gate and up together, one reduce-scatter of down's z `[T, R]`;
`reduce` - one all-reduce of the summands `[T, 2 I]` of gate and up (a reduce-scatter where down is dense).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neuronmlp_plugin.models.parallel_mlp import all_gather_together
from neuronmlp_plugin.models.projection import PROJECTIONS, MLPShape, ProjectionSpec
from neuronmlp_plugin.serving.trainium.layout import even_pivots, laid_out_shapes, partition_dim
from neuronmlp_plugin.serving.trainium.parallel import Parallel


class Projection(nn.Module):
    """One projection's slice: `first` meets the input, `second` makes the output (layout.py); one is None
    where the matrix is dense.
    """

    first: Any
    second: Any

    def __init__(
        self, name: str, spec: ProjectionSpec, shape: MLPShape, parallel: Parallel, scheme: str
    ) -> None:
        super().__init__()
        sizes = laid_out_shapes(name, spec, shape, parallel.size, scheme)
        for part in ("first", "second"):
            layer = parallel.linear(sizes[part], partition_dim(name, part, scheme)) if part in sizes else None
            self.register_module(part, layer)
        self.pivots = even_pivots(spec, parallel.size, scheme)

    def output(self, part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Gate or up under `gather`: this rank's z and all of z -> this rank's output channels `[..., I /
        tp]`.
        """
        if self.second is None:
            return part
        if not self.pivots:
            return self.second(whole)
        return torch.cat((part[..., : self.pivots], self.second(whole)), dim=-1)


class TorchPath(nn.Module):
    """`down(silu(gate(x)) * up(x))` of one rank by torch operations."""

    def __init__(
        self, specs: Mapping[str, ProjectionSpec], shape: MLPShape, parallel: Parallel, scheme: str
    ) -> None:
        super().__init__()
        gate, up, down = (Projection(name, specs[name], shape, parallel, scheme) for name in PROJECTIONS)
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.parallel, self.scheme = parallel, scheme

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's summand of y `[..., H]`, from x `[..., H]`."""
        return self._reduce(x) if self.scheme == "reduce" else self._gather(x)

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (p.output(part, whole) for p, part, whole in self._gate_up_z(x))
        h = F.silu(gate) * up
        down = self.down_proj
        if down.first is None:
            return down.second(h)
        z = self.parallel.reduce_scatter(down.first(h[..., down.pivots :]))
        if down.pivots:
            z = z + F.pad(h[..., : down.pivots], (0, z.shape[-1] - down.pivots))
        return down.second(z)

    def _gate_up_z(self, x: torch.Tensor) -> list[tuple[Projection, torch.Tensor, torch.Tensor]]:
        """For gate and up: the projection, its local z and its whole z (for a dense one, its local output
        twice).
        """
        projections = (self.gate_proj, self.up_proj)
        parts = [p.first(x) for p in projections]
        wholes = iter(
            all_gather_together(
                [z for p, z in zip(projections, parts, strict=True) if p.second is not None], self.parallel
            )
        )
        return [
            (p, z, z if p.second is None else next(wholes)) for p, z in zip(projections, parts, strict=True)
        ]

    def _reduce(self, x: torch.Tensor) -> torch.Tensor:
        down = self.down_proj
        gate, up = self._whole_gate_up(x) if down.first is not None else self._local_gate_up(x)
        h = F.silu(gate) * up
        return down.second(h if down.first is None else down.first(h))

    def _whole_gate_up(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Gate and up with all channels, `[..., I]` each."""
        projections = (self.gate_proj, self.up_proj)
        parts = [p.first(x) for p in projections]
        summands = [p.second(z) for p, z in zip(projections, parts, strict=True) if p.second is not None]
        sums = iter(
            self.parallel.all_reduce(torch.cat(summands, dim=-1)).chunk(len(summands), dim=-1)
            if summands
            else ()
        )
        gathered = iter(
            all_gather_together(
                [z for p, z in zip(projections, parts, strict=True) if p.second is None], self.parallel
            )
        )
        return [next(gathered) if p.second is None else next(sums) for p in projections]

    def _local_gate_up(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Gate and up with this rank's channels, `[..., I / tp]` each: all that a dense down asks for."""
        projections = (self.gate_proj, self.up_proj)
        parts = [p.first(x) for p in projections]
        summands = [p.second(z) for p, z in zip(projections, parts, strict=True) if p.second is not None]
        sums = iter(self.parallel.reduce_scatter(torch.stack(summands)) if summands else ())
        return [z if p.second is None else next(sums) for p, z in zip(projections, parts, strict=True)]
