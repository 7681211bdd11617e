"""The one optimiser loop of both stages: Adam without decay, a short warm-up, a cosine down to nothing; and
in which arithmetic it takes its products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from neuronmlp_plugin.compressor.job import Workspace
from neuronmlp_plugin.errors import NonFiniteError

WARM_UP = 5  # steps: Adam's first ones have no history, and the factors are good already
KEPT_EVERY = 32  # steps, where a descent is kept to go on from
_KEPT = "descent"


# The names under which torch says that a processor multiplies bf16 itself: x86 tiles, x86 vectors, ARM.
NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "bf16")


def chosen(asked: str, capabilities: Mapping[str, Any] | None = None) -> str:
    """`bfloat16` or `float32` as asked; for `auto`, bf16 only where the GPU or else the processor has it:
    emulated it is seven times slower than fp32.

    `capabilities`: those of another processor than this one (None), as `torch.cpu.get_capabilities` gives
    them.
    """
    if asked != "auto":
        return asked
    if capabilities is None and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    # An older torch does not say it, and is taken to run where bf16 is emulated.
    known = getattr(torch.cpu, "get_capabilities", dict)() if capabilities is None else capabilities
    return "bfloat16" if any(known.get(name) for name in NATIVE_BF16) else "float32"


def products(arithmetic: str, device: torch.device) -> Any:
    """The context in which products on `device` are taken in `arithmetic`; norms, softmaxes and sums stay
    fp32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=arithmetic == "bfloat16")


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
                f"--learning-rate {rate:g}: expected a finite loss, found {loss} at step {index + 1}; choose "
                "a lower one."
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
        optimiser.state[parameter] = {
            name: tensor if name == "step" else tensor.to(parameter.device) for name, tensor in mine.items()
        }
    return tensors["losses"].tolist()
