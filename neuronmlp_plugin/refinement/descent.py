"""The one optimiser loop of both stages: Adam without decay, a short warm-up, a cosine down to nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

WARM_UP = 5  # steps: Adam's first ones have no history, and the factors are good already


def descend(parameters: list[nn.Parameter], rate: float, steps: Iterable[Callable[[], float]], total: int) -> list[float]:
    """Take `total` steps; each call of `steps` adds gradients to the parameters and returns its loss. Returns the losses."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for index, step in enumerate(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * scheduled(index, total)
        losses.append(step())
        optimiser.step()
        optimiser.zero_grad()
    return losses


def scheduled(index: int, total: int) -> float:
    """Share of the learning rate at a step."""
    return min(1.0, (index + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * index / total))
