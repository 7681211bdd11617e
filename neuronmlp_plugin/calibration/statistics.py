"""The two statistics of docs/method.md: input moments (one forward pass) and output metrics (a short
backward pass).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neuronmlp_plugin.calibration.layer_stream import LayerStream
from neuronmlp_plugin.calibration.workers import Workers
from neuronmlp_plugin.lowrank.decompose import SecondMoment
from neuronmlp_plugin.models.factors import PROJECTIONS

BATCH = 2  # windows per forward call: large enough for full-speed matmuls, small enough for caches
DAMPING = 0.1  # share of the mean diagonal added to down's metric: a short backward pass sees few directions


@dataclasses.dataclass(frozen=True)
class LayerMoments:
    """E[x x^T] of a layer's MLP input (gate and up share it) `[H, H]` and of down's input `[I, I]`, with the
    tokens behind them.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class LayerMetrics:
    """E[g g^T] of the loss gradient at each projection's output: diagonals `[I]` for gate and up, full `[H,
    H]` for down.
    """

    gate_proj: torch.Tensor
    up_proj: torch.Tensor
    down_proj: torch.Tensor


@contextlib.contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks at the end, however it comes."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


@torch.no_grad()
def layer_moments(
    stream: LayerStream, layer: nn.Module, hidden: torch.Tensor, tick: Callable[[int], None], workers: Workers
) -> LayerMoments:
    """Run the layer over `hidden [windows, S, H]`, replacing it in place by the layer's output;
    `tick(windows)` after each batch.

    The moments are over the windows of all workers, and lie on the CPU.
    """
    mlp: Any = layer.mlp
    gate_up = SecondMoment(mlp.gate_proj.in_features, stream.device)
    down = SecondMoment(mlp.down_proj.in_features, stream.device)
    handles = [
        # `add` returns None: what else a pre-hook returns takes the place of the input
        mlp.gate_proj.register_forward_pre_hook(lambda _, args: gate_up.add(_flat(args[0]))),
        mlp.down_proj.register_forward_pre_hook(lambda _, args: down.add(_flat(args[0]))),
    ]
    with hooked(handles):
        run_in_place(stream, layer, hidden, tick)
    for moment in (gate_up, down):
        workers.add_up(moment)
    tokens = gate_up.count
    return LayerMoments(gate_up.mean().cpu(), down.mean().cpu(), tokens)


def run_in_place(
    stream: LayerStream, layer: nn.Module, hidden: torch.Tensor, tick: Callable[[int], None] = lambda _: None
) -> None:
    """Replace `hidden [windows, S, H]` by the layer's output, batch by batch."""
    with torch.no_grad():
        # `split` of no windows gives one empty batch, not none.
        for batch in hidden.split(BATCH) if len(hidden) else ():
            batch.copy_(stream.run(layer, batch))
            tick(len(batch))


def backward_in_place(
    stream: LayerStream, layer: nn.Module, hidden: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Replace `gradient [n, S, H]`, dL/d(output of the layer on `hidden`), by dL/dhidden; gradients of the
    layer's weights add up.

    The layer is run anew, batch by batch, so that only one batch of one layer keeps its activations.
    """
    batches = zip(hidden.split(BATCH), gradient.split(BATCH), strict=True)
    for batch, outer in batches if len(hidden) else ():
        leaf = batch.detach().to(stream.device).requires_grad_()
        stream.run(layer, leaf).backward(outer.to(stream.device))
        assert leaf.grad is not None
        outer.copy_(leaf.grad)


def loss_gradient(stream: LayerStream, hidden: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """dL/dhidden for the last layer's output `hidden [n, S, H]`, L the summed next-token loss over `windows
    [n, S]`.
    """
    head, gradient = stream.head(), torch.empty_like(hidden)
    for states, ids, found in zip(hidden, windows, gradient, strict=True):
        # A window at a time: logits of all of them would fill the memory. Summed and not averaged: what is
        # wanted is each token's own gradient.
        leaf = states.detach().to(stream.device).requires_grad_()
        F.cross_entropy(head(leaf[:-1]), ids[1:].to(stream.device), reduction="sum").backward()
        assert leaf.grad is not None
        found.copy_(leaf.grad)
    return gradient


def layer_metrics(
    stream: LayerStream, layer: nn.Module, hidden: torch.Tensor, gradient: torch.Tensor, workers: Workers
) -> LayerMetrics:
    """Token-wise second moments of dL/dy at the outputs of a layer's projections, over the windows of all
    workers.

    `gradient` is taken through the layer by `backward_in_place`.
    """
    mlp: Any = layer.mlp
    squares = {
        name: torch.zeros(getattr(mlp, name).out_features, dtype=torch.float64)
        for name in ("gate_proj", "up_proj")
    }
    full = SecondMoment(mlp.down_proj.out_features, stream.device)

    # A tensor hook that returns something would replace the gradient.
    def collect(name: str, gradient: torch.Tensor) -> None:
        if name == "down_proj":
            full.add(_flat(gradient))
        else:
            squares[name] += _flat(gradient).square().sum(0).cpu()

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: collect(name, gradient))

        return hook

    with hooked([getattr(mlp, name).register_forward_hook(watch(name)) for name in PROJECTIONS]):
        backward_in_place(stream, layer, hidden, gradient)
    # All three have seen the gradient of every token once: down's count serves for gate and up.
    squares = {name: workers.sum(square) for name, square in squares.items()}
    workers.add_up(full)
    tokens = full.count
    down = full.mean().cpu()
    down += DAMPING * down.diagonal().mean() * torch.eye(down.shape[0], dtype=down.dtype)
    return LayerMetrics(squares["gate_proj"] / tokens, squares["up_proj"] / tokens, down)
