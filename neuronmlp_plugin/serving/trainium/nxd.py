"""`Parallel` over neuronx-distributed: its sharded linear layers, which it alone knows how to slice, and its
collectives.
"""

from __future__ import annotations

from typing import Any

import torch
from neuronx_distributed.parallel_layers.layers import (
    BaseParallelLinear,
    ColumnParallelLinear,
    RowParallelLinear,
    SPMDRank,
)
from neuronx_distributed.parallel_layers.mappings import (
    gather_from_tensor_model_parallel_region_with_dim,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_tensor_model_parallel_region_with_dim,
)
from neuronx_distributed.parallel_layers.utils import set_tensor_model_parallel_attributes
from neuronx_distributed_inference.utils.distributed import get_tp_group
from torch import nn

from neuronmlp_plugin.models.factors import OUT
from neuronmlp_plugin.serving.trainium.sharding import Parallel, RankModule, slice_size


class Int8Slice(BaseParallelLinear):  # type: ignore[misc]
    """One rank's int8 weights and their scales, which NxD slices as it slices its own layers; no product."""

    def __init__(self, size: tuple[int, int], dim: int, scale_size: tuple[int, ...], tp: int) -> None:
        super().__init__()
        self._slice("weight", size, dim, torch.int8, tp)
        # Along the input every rank has all outputs, and so all of their scales: one part.
        self._slice("scale", scale_size, OUT, torch.float32, tp if dim == OUT else 1)

    def _slice(self, name: str, size: tuple[int, ...], dim: int, dtype: torch.dtype, parts: int) -> None:
        """A parameter that holds one of so many parts along `dim` of a whole of this size. It is registered
        before it is marked, since NxD's empty models make another of it then and cannot copy the marks.
        """
        mine = torch.zeros(slice_size(size, dim, parts), dtype=dtype)
        self.register_parameter(name, nn.Parameter(mine, requires_grad=False))
        set_tensor_model_parallel_attributes(
            getattr(self, name), parts > 1, dim, stride=1, num_partitions=parts
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As torch's, but scales stay fp32 when a model is brought to bf16: NxDI does so and then restores,
        by their names, only those of the models that it traces.
        """
        scale = self.scale.data
        super()._apply(fn, recurse)
        if self.scale.dtype is not torch.float32:
            self.scale.data = scale.to(self.scale.device)
        return self


class NxdParallel(Parallel):
    """Layers and collectives of one NxDI model's tensor-parallel group; sums in `rpl_reduce_dtype`, as in
    NxDI's own MLP.
    """

    def __init__(self, config: Any) -> None:
        self.group = get_tp_group(config)
        self.size = config.neuron_config.tp_degree
        self.dtype = config.neuron_config.torch_dtype
        self.reduce_dtype = config.neuron_config.rpl_reduce_dtype or self.dtype

    def column(self, n_in: int, n_out: int) -> nn.Module:
        return ColumnParallelLinear(
            n_in,
            n_out,
            bias=False,
            gather_output=False,
            dtype=self.dtype,
            tensor_model_parallel_group=self.group,
        )

    def row(self, n_in: int, n_out: int) -> nn.Module:
        return RowParallelLinear(
            n_in,
            n_out,
            bias=False,
            input_is_parallel=True,
            reduce_output=False,
            dtype=self.dtype,
            tensor_model_parallel_group=self.group,
        )

    def int8(self, size: tuple[int, int], dim: int, scale_size: tuple[int, ...]) -> nn.Module:
        return Int8Slice(size, dim, scale_size, self.size)

    def rank_module(self) -> RankModule:
        return SPMDRank(self.size, self.size)

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return gather_from_tensor_model_parallel_region_with_dim(x, dim, process_group=self.group)

    def scatter_sum(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        total = reduce_scatter_to_tensor_model_parallel_region_with_dim(
            x.to(self.reduce_dtype), dim, process_group=self.group
        )
        return total.to(x.dtype)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.gather(x, x.dim() - 1)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return self.scatter_sum(x, x.dim() - 1)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return reduce_from_tensor_model_parallel_region(x.to(self.reduce_dtype), process_group=self.group).to(
            x.dtype
        )
