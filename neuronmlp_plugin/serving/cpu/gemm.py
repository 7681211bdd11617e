"""One product `x weight^T`, packed the way vLLM packs its own dense layers on this platform."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.platforms import current_platform

from neuronmlp_plugin.models.definition import Linear, plain_linear


def prepacked_linear(weight: torch.Tensor, blocks: int = 1) -> Linear:
    """vLLM's CPU dispatch (oneDNN or another prepacked kernel) for a weight `[out, in]`, or one for each of
    its blocks; plain torch on other platforms.
    """
    if not current_platform.is_cpu():
        return plain_linear(weight, blocks)
    if blocks > 1:
        # vLLM packs a whole matrix: each block of a block-diagonal one is a product of its own.
        each = [prepacked_linear(block.contiguous()) for block in weight.chunk(blocks)]
        return lambda x: torch.cat([p(part) for p, part in zip(each, x.chunk(blocks, -1), strict=True)], -1)
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    holder = nn.Module()
    holder.weight = nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(holder, remove_weight=True)
    product: Any = holder.cpu_linear
    left = holder.weight  # empty where the packed copy replaced it
    return lambda x: product(x, left, None)
