"""What the MLP needs from the machinery that shards it: layers that hold a slice, the rank as data, and
collectives.
"""

from __future__ import annotations

import abc
from typing import Protocol

import torch
from torch import nn

from neuronmlp_plugin.models.factors import OUT
from neuronmlp_plugin.models.gather import Collectives


def slice_size(size: tuple[int, ...], dim: int, parts: int) -> tuple[int, ...]:
    """Size of one of so many equal parts along `dim`."""
    return tuple(n // parts if axis == dim else n for axis, n in enumerate(size))


class RankModule(Protocol):
    """A module that holds the rank as a parameter, so that one graph can serve all ranks."""

    def get_rank(self) -> torch.Tensor:
        """`[1]`, int32."""


class Parallel(Collectives, abc.ABC):
    """Collectives over the last dimension, two over any, and a factory of sharded layers without bias.

    The layers compute on their own slice and communicate nothing: the module decides when to. `dtype`: of the
    model, and of every layer that is not int8.
    """

    dtype: torch.dtype

    def linear(self, size: tuple[int, int], dim: int) -> nn.Module:
        """A layer whose `weight` is a slice along `dim` of a whole `[out, in]` of this size."""
        n_out, n_in = size
        return self.column(n_in, n_out) if dim == OUT else self.row(n_in, n_out)

    @abc.abstractmethod
    def column(self, n_in: int, n_out: int) -> nn.Module:
        """`[..., n_in]` -> this rank's `[..., n_out / tp]`."""

    @abc.abstractmethod
    def row(self, n_in: int, n_out: int) -> nn.Module:
        """This rank's `[..., n_in / tp]` -> a summand of `[..., n_out]`."""

    @abc.abstractmethod
    def int8(self, size: tuple[int, int], dim: int, scale_size: tuple[int, ...]) -> nn.Module:
        """A module that multiplies nothing: `weight`, int8, is a slice along `dim` of a whole `[out, in]` of
        this size; `scale`, fp32 whatever the model's dtype, one along its first dimension where `dim` is OUT,
        and the whole of it where not.
        """

    @abc.abstractmethod
    def rank_module(self) -> RankModule:
        """A module whose one parameter `rank` is this rank's number."""

    @abc.abstractmethod
    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' x one after another along `dim`."""

    @abc.abstractmethod
    def scatter_sum(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Sum of all ranks' x, of which this rank keeps its slice along `dim`."""
