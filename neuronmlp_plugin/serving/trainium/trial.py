"""One launch of each kernel through the compiler's front end, before any layer depends on it.

No chip is needed: the vendor's own `nki.trace` reads the kernel with its arguments and refuses what the
compiler would refuse; a vendor's nki without it is stood in for by our front end (`frontend.verdict`).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from neuronmlp_plugin.models.factors import OUT, MLPLayer
from neuronmlp_plugin.serving.trainium.kernel_path import KernelPath
from neuronmlp_plugin.serving.trainium.sharding import Parallel, RankModule, slice_size
from nki_kernels.frontend.verdict import verdict
from nki_kernels.layout import Layout

PLATFORM = "trn1"


def refusal(
    stored: MLPLayer, tp: int, dtype: torch.dtype, tokens: int, norm_eps: float | None = None
) -> str | None:
    """Why the compiler does not take the layer's kernels for so many tokens, in one line, or None.
    `norm_eps`: of the RMSNorm that the kernels are to apply, None where they are to apply none.
    """
    path = KernelPath(stored, _OneOfMany(tp, dtype))
    stages = iter([stage for stage in ("whole", "first", "second", "last") if stage in path.layouts])

    def launch(kernel: Callable[..., Any], *arguments: Any) -> torch.Tensor:
        trace(kernel, *arguments)
        return torch.zeros(_result_shape(path.layouts[next(stages)], tokens), dtype=dtype)

    path.launch = launch  # type: ignore[method-assign]
    norm = types.SimpleNamespace(weight=torch.ones(stored.hidden_size), variance_epsilon=norm_eps)
    try:
        path(torch.zeros(tokens, stored.hidden_size, dtype=dtype), None if norm_eps is None else norm)
    except Exception as error:  # whatever the vendor raises: its text is the reason
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"a kernel was refused for {tokens} tokens: {first_line[:300]}"
    return None


class KernelRefused(Exception):
    """What the compiler's front end says against a kernel."""


def trace(kernel: Callable[..., Any], *arguments: Any) -> None:
    """Have a kernel read with these arguments. Raises KernelRefused with the first thing against it."""
    as_arrays = [_as_array(value) if isinstance(value, torch.Tensor) else value for value in arguments]
    answer = verdict(getattr(kernel, "func", kernel), as_arrays, platform=PLATFORM)
    if answer.refusals:
        raise KernelRefused(f"{answer.who}: {answer.refusals[0]}")


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    # Tensor.numpy knows no bf16, and numpy has none of its own: the bits travel as integers.
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _result_shape(layout: Layout, tokens: int) -> tuple[int, int]:
    """Of one launch: z `[channels, T]` between collectives, y `[T, H]` at the end."""
    if layout.down_second is not None:
        return tokens, layout.down_second.cols
    ends = (layout.down_first,) if layout.down_first is not None else (layout.gate_first, layout.up_first)
    return sum(matrix.cols for matrix in ends if matrix is not None), tokens


class _Slice(nn.Module):
    """A layer of which only shape and dtype of its weight and scales count."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        if scale is not None:
            self.scale = nn.Parameter(scale, requires_grad=False)


class _Rank(nn.Module):
    def get_rank(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.int32)


class _OneOfMany(Parallel):
    """The first of `size` ranks, alone: every other rank's share is a copy of its own."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype

    def column(self, n_in: int, n_out: int) -> nn.Module:
        return _Slice(torch.zeros(n_out // self.size, n_in, dtype=self.dtype))

    def row(self, n_in: int, n_out: int) -> nn.Module:
        return _Slice(torch.zeros(n_out, n_in // self.size, dtype=self.dtype))

    def int8(self, size: tuple[int, int], dim: int, scale_size: tuple[int, ...]) -> nn.Module:
        scale = torch.ones(slice_size(scale_size, OUT, self.size if dim == OUT else 1))
        return _Slice(torch.zeros(slice_size(size, dim, self.size), dtype=torch.int8), scale)

    def rank_module(self) -> RankModule:
        return _Rank()

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([x] * self.size, dim)

    def scatter_sum(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.chunk(self.size, dim)[0]

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.gather(x, x.dim() - 1)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return self.scatter_sum(x, x.dim() - 1)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x
