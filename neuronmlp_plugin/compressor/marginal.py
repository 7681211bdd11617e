"""What each matrix is worth where it ends up: one backward pass of KL(dense || truncated) through the
truncated model.

The allocation adds up what each matrix loses alone. With all W' in place, -<dKL/dW', W - W'> is the
first-order gain of making one matrix whole again, with everything that the others do to it; curves are scaled
by how far that is from what was predicted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from neuronmlp_plugin.calibration.output_loss import kl_gradient
from neuronmlp_plugin.calibration.quality import last_hidden
from neuronmlp_plugin.calibration.statistics import backward_in_place, run_in_place
from neuronmlp_plugin.calibration.stream import LayerStream
from neuronmlp_plugin.compressor.progress import ProgressBars
from neuronmlp_plugin.compressor.search import TruncatedStream
from neuronmlp_plugin.compressor.workspace import Workspace
from neuronmlp_plugin.lowrank.allocate import Curve
from neuronmlp_plugin.models.factors import PROJECTIONS

# taken at its word (1.0) the measurement is too noisy for single matrices: docs/compression_experiments.md
POWER = 0.5
LIMIT = 4.0  # no matrix counts as more than this many times as dear, or as cheap, as the mean


def scaled(
    curves: Sequence[Curve], ranks: Sequence[int | None], gains: Sequence[float | None]
) -> list[Curve]:
    """The curves times (gain / predicted loss at that rank, over the mean of all)^POWER; what loses nothing
    keeps its own.
    """
    ratios = [
        None if g is None or not c.loss(k) > 0.0 else g / c.loss(k)
        for c, k, g in zip(curves, ranks, gains, strict=True)
    ]
    known = [ratio for ratio in ratios if ratio is not None]
    if not known or (mean := float(np.mean(known))) <= 0.0:
        return list(curves)
    factors = [
        1.0 if ratio is None else float(np.clip(ratio / mean, 1 / LIMIT, LIMIT)) ** POWER for ratio in ratios
    ]
    return [
        dataclasses.replace(curve, tail=curve.tail * factor)
        for curve, factor in zip(curves, factors, strict=True)
    ]


def measured_gains(
    truncated: TruncatedStream, windows: torch.Tensor, files: Workspace, bars: ProgressBars
) -> list[float | None]:
    """The gain of every matrix in nats a token of `windows [n, S]`, layer by layer in the order of
    PROJECTIONS; None for one that is dense.

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
    return [None if gain is None else gain / windows.numel() for layer in gains for gain in layer]


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
    """-<dKL/dW', W - W'> of the layer's matrices; `gradient` is taken through the layer in place."""
    layer = truncated.load(index)
    weights: dict[str, nn.Parameter] = {
        n: getattr(layer.mlp, n).weight for n in PROJECTIONS if truncated.chosen[index][n].rank is not None
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    backward_in_place(truncated, layer, hidden, gradient)
    whole = dense.load(index)
    gains = {
        n: -float((w.grad * (getattr(whole.mlp, n).weight - w.detach())).sum())
        for n, w in weights.items()
        if w.grad is not None
    }
    dense.release(index)
    truncated.release(index)
    return [gains.get(name) for name in PROJECTIONS]
