"""vLLM's tensor-parallel group as the three operations of `models/gather.py`."""

from __future__ import annotations

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from neuronmlp_plugin.models.gather import Collectives


class TensorParallel(Collectives):
    """vLLM's own operations, which torch.compile knows. Its CPU group has no reduce-scatter: there it is an
    all-reduce and a slice.
    """

    def __init__(self) -> None:
        self.rank, self.size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return tensor_model_parallel_all_gather(x.contiguous(), dim=-1)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_reduce(x).chunk(self.size, dim=-1)[self.rank].contiguous()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return tensor_model_parallel_all_reduce(x.contiguous())


def tensor_parallel() -> Collectives:
    """The group of this process, or the single-rank case."""
    return TensorParallel() if get_tensor_model_parallel_world_size() > 1 else Collectives()
