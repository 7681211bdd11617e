"""What the two stages of a refinement train towards.

Blocks: reconstruction (AA-SVD, arXiv 2604.02119), each layer's factors learn what the dense layer put out.

The compressed layer is fed what it will be fed when served (the output of the compressed layers before it),
and its target is the dense layer's output on the dense stream, so that a layer also makes up for what those
before it got wrong.

Distill: end to end, the weights learn the dense model's next-token distribution, and a share of the text
itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from neuronmlp_plugin.calibration.layer_stream import LayerStream, best_device
from neuronmlp_plugin.calibration.quality import (
    NO_TARGET,
    kl_gradient,
    last_hidden,
    mixed_gradient,
    next_token_gradient,
)
from neuronmlp_plugin.calibration.statistics import run_in_place
from neuronmlp_plugin.compressor.job import Workspace
from neuronmlp_plugin.models.definition import dequantize, quantize
from neuronmlp_plugin.refinement.descent import descend, products, trainable
from neuronmlp_plugin.refinement.refine_settings import RefineSettings


class BlockStreams:
    """Hidden states of both models moving through the layers together, for training windows and for held-out
    ones.
    """

    def __init__(
        self, dense: LayerStream, compressed: LayerStream, windows: torch.Tensor, held_out: torch.Tensor
    ) -> None:
        self.dense, self.compressed = dense, compressed
        self.exact = [dense.embed(windows), dense.embed(held_out)]
        self.given = [hidden.clone() for hidden in self.exact]

    def refine_layer(
        self,
        index: int,
        moving: Callable[[nn.Module], dict[str, Any]],
        rate: float,
        settings: RefineSettings,
    ) -> tuple[dict[str, torch.Tensor], float]:
        """`(trained tensors by name inside the layer, their held-out error)`; where training did not help, as
        they were.

        `moving` tells what is trained of a layer; one with nothing to train only passes the streams on.
        """
        self._advance(self.dense, self.dense.load(index), index, self.exact)
        layer = self.compressed.load(index)
        linears = moving(layer)
        start = {name: linear.weight.detach().clone() for name, linear in linears.items()}
        # What would be served without training is what training has to beat.
        stored = {n: dequantize(*quantize(w)) if settings.is_int8 else w for n, w in start.items()}
        _put(linears, stored)
        reached = error = self._held_out_error(layer)
        if linears:
            _put(linears, start)
            self._train(layer, linears, rate, settings)
            reached = self._held_out_error(layer)
            if reached >= error:
                reached = error
                _put(linears, stored)
        kept = {f"{name}.weight": linear.weight.detach().cpu().clone() for name, linear in linears.items()}
        self._advance(self.compressed, layer, index, self.given)
        return kept, reached

    def _advance(self, stream: LayerStream, layer: nn.Module, index: int, hidden: list[torch.Tensor]) -> None:
        for part in hidden:
            run_in_place(stream, layer, part)
        stream.release(index)

    def _train(
        self, layer: nn.Module, linears: dict[str, Any], rate: float, settings: RefineSettings
    ) -> None:
        given, exact = (hidden[0].split(settings.batch) for hidden in (self.given, self.exact))

        def step(x: torch.Tensor, y: torch.Tensor) -> float:
            with products(settings.arithmetic, self.compressed.device):
                loss = relative_error(self.compressed.run(layer, x), y)
            loss.backward()
            return float(loss.detach())

        with trainable(layer, linears.values(), settings.adapter_rank, settings.is_int8) as parameters:
            descend(
                parameters, rate, [functools.partial(step, x, y) for x, y in zip(given, exact, strict=True)]
            )

    @torch.no_grad()
    def _held_out_error(self, layer: nn.Module) -> float:
        pairs = zip(self.given[1], self.exact[1], strict=True)
        errors = [float(relative_error(self.compressed.run(layer, x[None]), y[None])) for x, y in pairs]
        return sum(errors) / len(errors)


def _put(linears: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    for name, linear in linears.items():
        linear.weight.data.copy_(weights[name])


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2, both `[n, S, H]`."""
    target = target.to(output.device)
    difference = (output.float() - target).square().sum(-1)
    return (difference / target.square().sum(-1).clamp_min(1e-12)).mean()


Tick = Callable[[int], None]


def teacher_states(
    dense: LayerStream, windows: torch.Tensor, settings: RefineSettings, tick: Tick
) -> torch.Tensor:
    """What the dense model's output matrix sees, `[n, S, H]` bf16: small enough to keep, where its logits are
    not.
    """
    with products(settings.arithmetic, dense.device):
        hidden = last_hidden(dense, windows, tick)
    norm, _ = dense.head()
    return torch.cat([norm(batch.to(dense.device)).bfloat16().cpu() for batch in hidden.split(8)])


def visits(windows: int, settings: RefineSettings) -> list[torch.Tensor]:
    """Which windows each step sees: all of them in a random order, then again in another, until `tokens` are
    seen.
    """
    wanted = max(1, settings.tokens // settings.window)
    generator = torch.Generator().manual_seed(settings.seed)
    rounds = [torch.randperm(windows, generator=generator) for _ in range(-(-wanted // windows))]
    return list(torch.cat(rounds)[:wanted].split(settings.batch))


def distill(
    student: Any,
    linears: Sequence[Any],
    teacher: torch.Tensor | None,
    windows: torch.Tensor,
    rate: float,
    share: float,
    settings: RefineSettings,
    files: Workspace,
    tick: Tick,
) -> list[float]:
    """Train the weights of `linears` of a Hugging Face model in place; returns the loss of every step, per
    token.

    `teacher`: `teacher_states` of `windows [n, S]`, or None for the next-token loss; `share`: that of the
    next token. `files` keeps what an interrupted run goes on from; `tick(1)` after each step.
    """
    device = best_device()
    student.to(device)
    head = student.lm_head.weight.detach()
    head = head.bfloat16() if settings.arithmetic == "bfloat16" else head

    def step(part: torch.Tensor) -> float:
        ids = windows[part].to(device)
        with products(settings.arithmetic, device):
            hidden = student.model(input_ids=ids, use_cache=False).last_hidden_state
        rows = (hidden if teacher is not None else hidden[:, :-1]).flatten(0, 1)
        states = None if teacher is None else teacher[part].to(device).flatten(0, 1)
        loss, gradient = _gradient(rows.detach(), states, ids, head, share)
        # Head and loss have been taken backward by hand, in pieces: all logits at once never exist.
        rows.backward(gradient / len(rows))
        return loss / len(rows)

    steps = [functools.partial(step, part) for part in visits(len(windows), settings)]
    with trainable(student, linears, settings.adapter_rank, settings.is_int8) as parameters:
        losses = descend(parameters, rate, steps, files, tick)
    student.to("cpu")
    return losses


def _gradient(
    rows: torch.Tensor, states: torch.Tensor | None, ids: torch.Tensor, head: torch.Tensor, share: float
) -> tuple[float, torch.Tensor]:
    """Of the loss by the last hidden states of the windows `ids [b, S]`: `rows [b S, H]`, or without `states`
    `[b (S - 1), H]`.
    """
    if states is None:
        return next_token_gradient(rows, ids[:, 1:].flatten(), head)
    if not share:
        return kl_gradient(rows, states, head)
    following = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], NO_TARGET)), dim=1)
    return mixed_gradient(rows, states, following.flatten(), head, share)
