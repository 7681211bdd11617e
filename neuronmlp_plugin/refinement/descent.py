"""The one optimiser loop of both stages: Adam without decay, a short warm-up, a cosine down to nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import AdamW

from neuronmlp_plugin.compressor.workspace import Workspace
from neuronmlp_plugin.errors import NonFiniteError

WARM_UP = 5  # steps: Adam's first ones have no history, and the factors are good already
KEPT_EVERY = 32  # steps, where a descent is kept to go on from
_KEPT = "descent"


def descend(
    parameters: list[nn.Parameter],
    rate: float,
    steps: Sequence[Callable[[], float]],
    files: Workspace | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Take all `steps`, each of which adds gradients to the parameters and returns its loss; `tick(1)` after
    each. Returns the losses.

    With `files` it goes on from where an earlier call that was interrupted left them, to the same numbers.
    """
    optimiser = AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = _resumed(files, parameters, optimiser) if files is not None and files.has(_KEPT) else []
    tick(len(losses))
    for index in range(len(losses), len(steps)):
        for group in optimiser.param_groups:
            group["lr"] = rate * scheduled(index, len(steps))
        loss = steps[index]()
        if not math.isfinite(loss):  # before it is in the numbers, and in what a later run goes on from
            raise NonFiniteError(
                f"--learning-rate {rate:g}: expected a finite loss, found {loss} at step {index + 1}; choose a lower one."
            )
        losses.append(loss)
        optimiser.step()
        optimiser.zero_grad()
        tick(1)
        if files is not None and len(losses) % KEPT_EVERY == 0:
            _keep(files, parameters, optimiser, losses)
    return losses


def scheduled(index: int, total: int) -> float:
    """Share of the learning rate at a step."""
    return min(1.0, (index + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * index / total))


def _keep(files: Workspace, parameters: list[nn.Parameter], optimiser: AdamW, losses: list[float]) -> None:
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for index, parameter in enumerate(parameters):
        tensors[f"{index}.value"] = parameter.detach()
        tensors |= {f"{index}.{name}": tensor for name, tensor in optimiser.state[parameter].items()}
    files.save(_KEPT, tensors)


def _resumed(files: Workspace, parameters: list[nn.Parameter], optimiser: AdamW) -> list[float]:
    """Put parameters and moments back; returns the losses of the steps that led there."""
    tensors = files.load(_KEPT)
    for index, parameter in enumerate(parameters):
        prefix = f"{index}."
        mine = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        parameter.data.copy_(mine.pop("value"))
        optimiser.state[parameter] = mine
    return tensors["losses"].tolist()
