"""The MLP module of one rank without NxDI: layers that hold a slice, and any `Collectives` behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.models.factors import PROJECTIONS, MLPLayer, MLPShape
from neuronmlp_plugin.models.gather import Collectives
from neuronmlp_plugin.serving.trainium.dispatch import Decision
from neuronmlp_plugin.serving.trainium.layout import partition_dim
from neuronmlp_plugin.serving.trainium.mlp import LowRankMLP
from neuronmlp_plugin.serving.trainium.parallel import Parallel
from neuronmlp_plugin.serving.trainium.state_dict import lay_out_state
from nki_kernels.backend import simulate


class LocalParallel(Parallel):
    """`Parallel` with plain `nn.Linear` slices; the sequence collectives are the others on a transposed
    tensor.
    """

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

    def rank_module(self) -> nn.Module:
        return RankAsData(self.rank)

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return self.all_gather(x.transpose(dim, -1)).transpose(dim, -1).contiguous()

    def scatter_sum(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return self.reduce_scatter(x.transpose(dim, -1)).transpose(dim, -1).contiguous()


class RankAsData(nn.Module):
    """NxDI's SPMDRank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = nn.Parameter(torch.tensor([rank], dtype=torch.int32), requires_grad=False)

    def get_rank(self) -> torch.Tensor:
        return self.rank


TORCH = dict.fromkeys(("prefill", "decode"), Decision("torch", "test"))
KERNEL = dict.fromkeys(("prefill", "decode"), Decision("kernel", "test"))


def simulated(kernel: Callable[..., Any], *arguments: Any) -> torch.Tensor:
    """A launch of `KernelPath` through the simulator, on the very tensors that it was given."""
    result = np.array(
        simulate(kernel)(*(_to_numpy(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    )
    return (
        torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
        if result.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(result)
    )


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    return (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if tensor.dtype == torch.bfloat16
        else tensor.numpy()
    )


def rank_state(
    layer: MLPLayer,
    modules: dict[str, nn.Module],
    tp: int,
    rank: int,
    paths: set[str],
) -> dict[str, torch.Tensor]:
    """The rank's parameters: laid out for all ranks as NxDI is given them, then cut as NxDI cuts them, into
    contiguous slices.
    """
    prefix = "layers.0.mlp."
    state = {
        f"{prefix}{p}.{suffix}": tensor
        for p in PROJECTIONS
        for suffix, tensor in modules[p].state_dict().items()
    }
    shape = MLPShape(layer.hidden_size, layer.channels, 1)
    lay_out_state(state, FormatBlock((layer,), shape), [paths], tp, "test")
    return {name.removeprefix(prefix): _slice(name, whole, layer, tp, rank) for name, whole in state.items()}


def _slice(name: str, whole: torch.Tensor, layer: MLPLayer, tp: int, rank: int) -> torch.Tensor:
    *_, path, projection, part, _ = name.split(".")
    dim = 0
    if path == "torch_path":
        dim = partition_dim(layer.matrix(projection), part, layer.gathers(tp))
    return whole.chunk(tp, dim)[rank]


def rank_mlp(
    layer: MLPLayer,
    modules: dict[str, nn.Module],
    collectives: Collectives,
    decisions: dict[str, Decision] = TORCH,
    **options: bool,
) -> LowRankMLP:
    """The module of `collectives.rank`, loaded strictly."""
    mlp = LowRankMLP(layer, LocalParallel(collectives), decisions, **options)
    paths = {decision.path for decision in decisions.values()}
    state = rank_state(layer, modules, collectives.size, collectives.rank, paths)
    mlp.load_state_dict(state, strict=True, assign=True)
    return mlp
