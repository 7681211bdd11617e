"""The MLP module of one rank without NxDI: layers that hold a slice, and any `Collectives` behind them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import nn

from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.models.definition import Tensors
from neuronmlp_plugin.models.factors import OUT, PROJECTIONS, MLPLayer, MLPShape
from neuronmlp_plugin.models.gather import Collectives
from neuronmlp_plugin.serving.trainium.dispatch import Decision
from neuronmlp_plugin.serving.trainium.low_rank_mlp import LowRankMLP
from neuronmlp_plugin.serving.trainium.sharding import Parallel, partition_dim, slice_size
from neuronmlp_plugin.serving.trainium.state_dict import lay_out_state
from nki_kernels.backend import simulate
from tests.thread_group import ThreadGroup


class LocalParallel(Parallel):
    """`Parallel` with plain `nn.Linear` slices; the sequence collectives are the others on a transposed
    tensor.
    """

    def __init__(self, collectives: Collectives, dtype: torch.dtype = torch.float32) -> None:
        self.collectives, self.rank, self.size = collectives, collectives.rank, collectives.size
        self.dtype = dtype

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

    def int8(self, size: tuple[int, int], dim: int, scale_size: tuple[int, ...]) -> nn.Module:
        scale = slice_size(scale_size, OUT, self.size if dim == OUT else 1)
        return Int8Slice(slice_size(size, dim, self.size), scale)

    def rank_module(self) -> nn.Module:
        return RankAsData(self.rank)

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return self.all_gather(x.transpose(dim, -1)).transpose(dim, -1).contiguous()

    def scatter_sum(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return self.reduce_scatter(x.transpose(dim, -1)).transpose(dim, -1).contiguous()


class Int8Slice(nn.Module):
    """nxd.Int8Slice without NxD."""

    def __init__(self, size: tuple[int, ...], scale_size: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(scale_size), requires_grad=False)


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
    tensors: Mapping[str, Tensors],
    tp: int,
    rank: int,
    paths: set[str],
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """The rank's parameters, from tensors by projection and suffix of FORMAT.md: laid out for all ranks as
    NxDI is given them, then cut as NxDI cuts them, into contiguous slices.
    """
    prefix = "layers.0.mlp."
    state = {f"{prefix}{p}.{suffix}": tensor for p in PROJECTIONS for suffix, tensor in tensors[p].items()}
    shape = MLPShape(layer.hidden_size, layer.channels, 1)
    lay_out_state(state, FormatBlock((layer,), shape), [paths], tp, dtype, "test")
    return {name.removeprefix(prefix): _slice(name, whole, layer, tp, rank) for name, whole in state.items()}


def _slice(name: str, whole: torch.Tensor, layer: MLPLayer, tp: int, rank: int) -> torch.Tensor:
    *_, path, projection, part, leaf = name.split(".")
    dim = 0
    if path == "torch_path":
        dim = partition_dim(layer.matrix(projection), part, layer.gathers(tp))
        if leaf == "scale" and dim != OUT:
            return whole
    return whole.chunk(tp, dim)[rank]


def rank_mlp(
    layer: MLPLayer,
    tensors: Mapping[str, Tensors],
    collectives: Collectives,
    decisions: dict[str, Decision] = TORCH,
    dtype: torch.dtype = torch.float32,
    **options: bool,
) -> LowRankMLP:
    """The module of `collectives.rank`, loaded strictly, in a model of `dtype`."""
    mlp = LowRankMLP(layer, LocalParallel(collectives, dtype), decisions, **options)
    paths = {decision.path for decision in decisions.values()}
    state = rank_state(layer, tensors, collectives.size, collectives.rank, paths, dtype)
    mlp.load_state_dict(state, strict=True, assign=True)
    return mlp


ONE_AT_A_TIME = threading.Lock()  # ranks are threads, the simulator is for one


class Simulated:
    """Launches through the simulator; the kernels' names and arguments are kept, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __call__(self, kernel: Callable[..., Any], *arguments: Any) -> torch.Tensor:
        self.calls.append((kernel.__name__, arguments))
        with ONE_AT_A_TIME:
            return simulated(kernel, *arguments)


class Ran(NamedTuple):
    """y of every rank; the kernels of rank 0 and their arguments, in order; all collectives."""

    outputs: list[torch.Tensor]
    launches: list[str]
    arguments: list[tuple[Any, ...]]
    collectives: list[tuple[str, int]]


def run_kernels(
    layer: MLPLayer, tensors: Mapping[str, Tensors], tp: int, x: torch.Tensor, norm: Any = None
) -> Ran:
    """The layer by kernels on tp ranks, in the dtype of x."""
    group, launches = ThreadGroup(tp), [Simulated() for _ in range(tp)]

    @torch.no_grad()
    def work(collectives: Collectives) -> torch.Tensor:
        mlp = rank_mlp(layer, tensors, collectives, KERNEL, x.dtype)
        mlp.kernel_path.launch = launches[collectives.rank]
        return mlp(x, rmsnorm=norm)[0]

    outputs = group.run(work)
    names, arguments = zip(*launches[0].calls, strict=True)
    return Ran(outputs, list(names), list(arguments), group.log)
