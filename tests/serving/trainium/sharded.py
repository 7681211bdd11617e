"""The MLP module of one rank without NxDI: layers that hold a slice, and any `Collectives` behind them."""

from __future__ import annotations

import torch
from torch import nn

from neuronmlp_plugin.models.collectives import Collectives
from neuronmlp_plugin.models.projection import PROJECTIONS, MLPShape, ProjectionSpec
from neuronmlp_plugin.serving.trainium.layout import lay_out, partition_dim
from neuronmlp_plugin.serving.trainium.mlp import LowRankMLP
from neuronmlp_plugin.serving.trainium.parallel import Parallel


class LocalParallel(Parallel):
    """`Parallel` with plain `nn.Linear` slices; the sequence collectives are the others on a transposed tensor."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives, self.rank, self.size = collectives, collectives.rank, collectives.size

    def column(self, n_in: int, n_out: int) -> nn.Module:
        assert n_out % self.size == 0
        return nn.Linear(n_in, n_out // self.size, bias=False)

    def row(self, n_in: int, n_out: int) -> nn.Module:
        assert n_in % self.size == 0
        return nn.Linear(n_in // self.size, n_out, bias=False)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.collectives.all_gather(x)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return self.collectives.reduce_scatter(x)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.collectives.all_reduce(x)

    def gather_sequence(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_gather(x.transpose(1, 2)).transpose(1, 2)

    def scatter_sequence(self, y: torch.Tensor) -> torch.Tensor:
        return self.reduce_scatter(y.transpose(1, 2)).transpose(1, 2)


def rank_state(
    specs: dict[str, ProjectionSpec], modules: dict[str, nn.Module], tp: int, rank: int, scheme: str
) -> dict[str, torch.Tensor]:
    """The rank's parameters, cut as NxDI cuts: contiguous slices of each whole tensor."""
    state = {}
    for projection in PROJECTIONS:
        for part, whole in lay_out(projection, specs[projection], modules[projection].state_dict(), tp, scheme).items():
            state[f"{projection}.{part}.weight"] = whole.chunk(tp, partition_dim(projection, part, scheme))[rank]
    return state


def rank_mlp(
    specs: dict[str, ProjectionSpec], modules: dict[str, nn.Module], shape: MLPShape, collectives: Collectives, scheme: str, **options: bool
) -> LowRankMLP:
    """The module of `collectives.rank`, loaded strictly."""
    mlp = LowRankMLP(specs, shape, LocalParallel(collectives), scheme, **options)
    state = rank_state(specs, modules, collectives.size, collectives.rank, scheme)
    mlp.load_state_dict(state, strict=True, assign=True)
    return mlp
