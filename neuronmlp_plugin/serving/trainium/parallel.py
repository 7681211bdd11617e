"""What the MLP module needs from the machinery that shards it: linear layers that hold a slice, and collectives."""

from __future__ import annotations

import abc

import torch
from torch import nn

from neuronmlp_plugin.models.collectives import Collectives
from neuronmlp_plugin.serving.trainium.layout import COLUMN


class Parallel(Collectives, abc.ABC):
    """Collectives over the last dimension, two over the sequence dimension, and a factory of sharded layers without bias.

    The layers compute on their own slice and communicate nothing: the module decides when to.
    """

    def linear(self, size: tuple[int, int], dim: int) -> nn.Module:
        """A layer whose `weight` is a slice along `dim` of a whole `[out, in]` of this size."""
        n_out, n_in = size
        return self.column(n_in, n_out) if dim == COLUMN else self.row(n_in, n_out)

    @abc.abstractmethod
    def column(self, n_in: int, n_out: int) -> nn.Module:
        """`[..., n_in]` -> this rank's `[..., n_out / tp]`."""

    @abc.abstractmethod
    def row(self, n_in: int, n_out: int) -> nn.Module:
        """This rank's `[..., n_in / tp]` -> a summand of `[..., n_out]`."""

    @abc.abstractmethod
    def gather_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S / tp, H]` of each rank -> `[B, S, H]`."""

    @abc.abstractmethod
    def scatter_sequence(self, y: torch.Tensor) -> torch.Tensor:
        """Sum of all ranks' `[B, S, H]`, of which this rank keeps its `[B, S / tp, H]`."""
