"""What each part of a choice is worth where it ends up: one backward pass of KL(dense || truncated) through
the truncated model.

The allocation adds up what each part loses alone: a layer's removed channels, and the rank of each matrix.
With all W' in place, -<dKL/dW', W - W'> is the first-order gain of making one part whole again, with
everything that the others do to it; losses are scaled by how far that is from what was predicted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from neuronmlp_plugin.calibration.layer_stream import LayerStream
from neuronmlp_plugin.calibration.quality import kl_gradient, last_hidden
from neuronmlp_plugin.calibration.statistics import backward_in_place, run_in_place
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.compressor.job import ProgressBars, Workspace
from neuronmlp_plugin.compressor.offers import FactoredLayer
from neuronmlp_plugin.lowrank.allocate import Choice, Layer, Level, parts
from neuronmlp_plugin.models.factors import PROJECTIONS

# taken at its word (1.0) the measurement is too noisy for single matrices: docs/compression_experiments.md
POWER = 0.5
LIMIT = 4.0  # no matrix counts as more than this many times as dear, or as cheap, as the mean


Gains = Sequence[float | None]  # of a layer: of its channels removed, of gate, up and down


class TruncatedStream(LayerStream):
    """The dense model, one layer at a time, with the matrices that `factored(index)` stands for in place of
    any factors; a layer of which it is None is the base's own.

    Removed channels stay where they were, and down does not look at them: so what they would be worth has a
    gradient.
    """

    def __init__(
        self, base: Checkpoint, factored: Callable[[int], FactoredLayer | None], device: torch.device
    ) -> None:
        super().__init__(base, device=device)
        self.factored = factored

    def load(self, index: int) -> nn.Module:
        layer: Any = super().load(index)
        found = self.factored(index)
        if found is None:
            return layer
        for name in PROJECTIONS:
            weight = placed(found, found.low_rank(name), name, getattr(layer.mlp, name).weight)
            getattr(layer.mlp, name).weight = nn.Parameter(weight, requires_grad=False)
        return layer


def placed(found: FactoredLayer, kept: torch.Tensor, name: str, base: torch.Tensor) -> torch.Tensor:
    """`kept`, of the layer's k channels, among all channels of the `base` matrix: gate's and up's others as
    they were, down's zero.
    """
    kept, channels = kept.to(base.device, base.dtype), found.channels.to(base.device)
    if name == "down_proj":
        return torch.zeros_like(base).index_copy(1, channels, kept)
    return base.detach().index_copy(0, channels, kept)


def scaled(layers: Sequence[Layer], choices: Sequence[Choice], gains: Sequence[Gains]) -> list[Layer]:
    """The layers with each part's losses times (gain / predicted loss of the choice, over the mean of
    all)^POWER.

    What was not measured, because nothing was taken there, goes by the rest of its layer, and a layer of
    which nothing was taken by its neighbours: most of what a prediction misses is a matter of depth.
    """
    predicted = [parts(layer, choice) for layer, choice in zip(layers, choices, strict=True)]
    known = [
        [(g, p) for g, p in zip(gain, loss, strict=True) if g is not None and p > 0.0]
        for gain, loss in zip(gains, predicted, strict=True)
    ]
    # Over their mean, further down: an allocation asks only what parts are worth to each other.
    ratios = [g / p for layer in known for g, p in layer]
    if not ratios or (mean := float(np.mean(ratios))) <= 0.0:
        return list(layers)
    at = [index for index, layer in enumerate(known) if layer]
    whole = [sum(g for g, _ in known[index]) / sum(p for _, p in known[index]) for index in at]
    by_depth = np.interp(range(len(layers)), at, whole)
    found: list[Layer] = []
    for layer, gain, loss, depth in zip(layers, gains, predicted, by_depth, strict=True):
        own = [depth if g is None or not p > 0.0 else g / p for g, p in zip(gain, loss, strict=True)]
        factors = [float(np.clip(ratio / mean, 1 / LIMIT, LIMIT)) ** POWER for ratio in own]
        found.append([_times(level, factors) for level in layer])
    return found


def _times(level: Level, factors: list[float]) -> Level:
    curves = tuple(
        dataclasses.replace(c, tail=c.tail * f) for c, f in zip(level.curves, factors[1:], strict=True)
    )
    return dataclasses.replace(level, removal=level.removal * factors[0], curves=curves)


def measured_gains(
    truncated: TruncatedStream, windows: torch.Tensor, files: Workspace, bars: ProgressBars
) -> list[list[float | None]]:
    """The gains of every layer in nats a token of `windows [n, S]`: of its removed channels, and of the rank
    of gate, up and down; None for what is whole.

    `files` holds each layer's input for the time being.
    """
    dense = LayerStream(truncated.checkpoint, device=truncated.device)
    gains: list[list[float | None]] = []
    with bars.stage("measured gains", 4 * dense.num_layers) as tick:
        exact = last_hidden(dense, windows, tick)
        gradient = _divergence_gradient(truncated, exact, _forward(truncated, files, windows, tick))
        for index in reversed(range(dense.num_layers)):
            hidden = files.load(_input(index))["hidden"]
            gains.insert(0, _layer_gains(dense, truncated, index, hidden, gradient))
            files.drop(_input(index))
            tick(2)
    return [[None if gain is None else gain / windows.numel() for gain in layer] for layer in gains]


def _input(index: int) -> str:
    return f"measured-{index:05d}"


def _forward(
    stream: LayerStream, files: Workspace, windows: torch.Tensor, tick: Callable[[int], None]
) -> torch.Tensor:
    """The last layer's output; the input of each layer is left as a file."""
    hidden = stream.embed(windows)
    for index in range(stream.num_layers):
        files.save(_input(index), {"hidden": hidden})
        run_in_place(stream, stream.load(index), hidden)
        stream.release(index)
        tick(1)
    return hidden


def _divergence_gradient(stream: LayerStream, exact: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
    """dKL/dreached, summed over tokens; both `[n, S, H]`, before the final norm."""
    (norm, output), gradients = stream.head(), []
    for x, y in zip(exact, reached, strict=True):
        leaf = y.to(stream.device).requires_grad_()
        rows = norm(leaf)
        _, by_rows = kl_gradient(rows.detach(), norm(x.to(stream.device)), output.get_buffer("weight"))
        rows.backward(by_rows)
        assert leaf.grad is not None
        gradients.append(leaf.grad.to(reached.device))
    return torch.stack(gradients)


def _layer_gains(
    dense: LayerStream, truncated: TruncatedStream, index: int, hidden: torch.Tensor, gradient: torch.Tensor
) -> list[float | None]:
    """-<dKL/dW', W - W'> of the layer's parts; `gradient` is taken through the layer in place."""
    layer: Any = truncated.load(index)
    found = truncated.factored(index)
    weights: dict[str, nn.Parameter] = {n: getattr(layer.mlp, n).weight for n in PROJECTIONS if found}
    for weight in weights.values():
        weight.requires_grad_(True)
    backward_in_place(truncated, layer, hidden, gradient)
    whole: Any = dense.load(index)
    gains: list[float | None] = [None] * (1 + len(PROJECTIONS))
    for position, (name, weight) in enumerate(weights.items(), start=1):
        exact = getattr(whole.mlp, name).weight
        assert found is not None and weight.grad is not None
        before = placed(found, found.weights[name], name, exact)  # of the kept channels, before any rank
        if name in found.factors:
            gains[position] = -float((weight.grad * (before - weight.detach())).sum())
        # Of down alone: rows of gate and up that were removed stand where they were (`placed`), unseen by
        # down.
        if name == "down_proj" and len(found.channels) < exact.shape[1]:
            gains[0] = -float((weight.grad * (exact - before)).sum())
    dense.release(index)
    truncated.release(index)
    return gains
