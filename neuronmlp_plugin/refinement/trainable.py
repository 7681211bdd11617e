"""Which numbers may move: the stored weights of MLPs, in whole or through LoRA adapters of low rank, as they
are or through int8.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from neuronmlp_plugin.models.definition import StoredLinear, dequantize, quantize
from neuronmlp_plugin.models.factors import PROJECTIONS


class LowRankUpdate(nn.Module):
    """LoRA (2106.09685): weight `[out, in]` + b a, with a `[r, in]` random and b `[out, r]` zero, so that it
    begins as nothing.
    """

    def __init__(self, size: torch.Size, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, size[1]) / math.sqrt(size[1]))
        self.b = nn.Parameter(torch.zeros(size[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


class Rounded(nn.Module):
    """int8 in training: forward gives the numbers that will be served, while the gradient goes to those that
    they were rounded from (straight-through, arXiv 1308.3432).
    """

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (dequantize(*quantize(weight.detach())) - weight.detach())


def mlp_linears(module: nn.Module) -> dict[str, Any]:
    """What multiplies by the stored weights of every MLP inside `module`, by name. A pivot's identity is no
    tensor, and so stays one.
    """
    found: dict[str, Any] = {}
    for name, projection in module.named_modules():
        if isinstance(projection, StoredLinear):
            found |= {f"{name}.{part}": child for part, child in projection.named_children()}
        elif name.rpartition(".")[2] in PROJECTIONS:
            found[name] = projection
    return found


@contextlib.contextmanager
def trainable(
    module: nn.Module, linears: Collection[Any], adapter_rank: int, is_int8: bool = False
) -> Iterator[list[nn.Parameter]]:
    """The parameters to train: the weights of these `linears` of `module`, or adapters for them.

    At the end adapters are merged into the weights, which are rounded where `is_int8`, and all is frozen
    again.
    """
    module.requires_grad_(False)
    for linear in linears:
        linear.weight.requires_grad_(not adapter_rank)
        if adapter_rank:
            update = LowRankUpdate(linear.weight.shape, adapter_rank).to(linear.weight.device)
            parametrize.register_parametrization(linear, "weight", update)
        if is_int8:
            parametrize.register_parametrization(linear, "weight", Rounded())
    try:
        yield [parameter for parameter in module.parameters() if parameter.requires_grad]
    finally:
        for linear in linears if adapter_rank or is_int8 else ():
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
        module.requires_grad_(False)
