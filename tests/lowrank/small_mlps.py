"""A small MLP with statistics of the kind that a real one has: correlated inputs, a decaying spectrum."""

from __future__ import annotations

import torch

from neuronmlp_plugin.lowrank.slices import MLP


def spread_moment(size: int, generator: torch.Generator) -> torch.Tensor:
    """A well-conditioned second moment `[size, size]` with a decaying spectrum."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.logspace(0, -2, size, dtype=torch.float64)) @ basis.T


def small_mlp(hidden: int = 24, channels: int = 48, seed: int = 0) -> MLP:
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    metrics = randn(2, channels).square() + 0.1
    return MLP(
        randn(channels, hidden),
        randn(channels, hidden),
        randn(hidden, channels),
        spread_moment(hidden, g),
        spread_moment(channels, g),
        metrics[0],
        metrics[1],
        spread_moment(hidden, g),
    )


def down_loss(mlp: MLP, stand_in: torch.Tensor) -> float:
    """|| G^1/2 (W - W') C^1/2 ||^2 by its definition; W' `[H, I]`."""
    error = mlp.down.double() - stand_in
    return float((mlp.down_metric @ error @ mlp.channels * error).sum())
