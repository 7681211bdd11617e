"""The one optimiser loop of both stages: Adam without decay, a short warm-up, a cosine down to nothing; and
in which arithmetic it takes its products. And which numbers move: the stored weights of MLPs, in whole or
through LoRA adapters of low rank, as they are or through int8.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import AdamW

from neuronmlp_plugin.compressor.job import Workspace
from neuronmlp_plugin.errors import NonFiniteError
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
        # The bracket has no gradient: weight goes through as if nothing were rounded.
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
            # After the adapter, so that the merged weight is what is rounded.
            parametrize.register_parametrization(linear, "weight", Rounded())
    try:
        yield [parameter for parameter in module.parameters() if parameter.requires_grad]
    finally:
        for linear in linears if adapter_rank or is_int8 else ():
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
        module.requires_grad_(False)


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
            # AdamW keeps its count of steps on the CPU
            name: tensor if name == "step" else tensor.to(parameter.device)
            for name, tensor in mine.items()
        }
    return tensors["losses"].tolist()
