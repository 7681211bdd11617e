"""Which numbers may move: the factors of matrices that are not dense, in whole or through LoRA adapters of
low rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from neuronmlp_plugin.models.definition import StoredLinear


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


def factor_linears(module: nn.Module) -> dict[str, Any]:
    """The products of every factored projection inside `module`, by name. A pivot's identity is no tensor,
    and so stays one.
    """
    found: dict[str, Any] = {}
    for name, projection in module.named_modules():
        if isinstance(projection, StoredLinear):
            found |= {f"{name}.{part}": child for part, child in projection.named_children()}
    return found


@contextlib.contextmanager
def trainable(module: nn.Module, adapter_rank: int) -> Iterator[list[nn.Parameter]]:
    """The parameters to train; at the end adapters are merged into the factors and everything is frozen
    again.
    """
    module.requires_grad_(False)
    linears = list(factor_linears(module).values())
    for linear in linears:
        if adapter_rank:
            parametrize.register_parametrization(
                linear, "weight", LowRankUpdate(linear.weight.shape, adapter_rank)
            )
        else:
            linear.requires_grad_(True)
    try:
        yield [parameter for parameter in module.parameters() if parameter.requires_grad]
    finally:
        for linear in linears if adapter_rank else ():
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
        module.requires_grad_(False)
