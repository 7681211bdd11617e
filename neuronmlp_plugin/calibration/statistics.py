"""The two statistics of shared svd.md: input moments (S0, one forward pass) and output metrics (S1, a short backward pass)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neuronmlp_plugin.calibration.stream import LayerStream
from neuronmlp_plugin.lowrank.moments import SecondMoment

BATCH = 4  # windows per forward call: large enough for full-speed matmuls, small enough to bound memory
DAMPING = 0.1  # share of the mean diagonal added to down's metric: a short backward pass sees few directions


@dataclasses.dataclass(frozen=True)
class LayerMoments:
    """E[x x^T] of a layer's MLP input (gate and up share it) `[H, H]` and of down's input `[I, I]`, with the tokens behind them."""

    gate_up: torch.Tensor
    down: torch.Tensor
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class LayerMetrics:
    """E[g g^T] of the loss gradient at each projection's output: diagonals `[I]` for gate and up, full `[H, H]` for down."""

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
def layer_moments(stream: LayerStream, layer: nn.Module, hidden: torch.Tensor, tick: Callable[[int], None]) -> LayerMoments:
    """Run the layer over `hidden [windows, S, H]`, replacing it in place by the layer's output; `tick(windows)` after each batch."""
    mlp: Any = layer.mlp
    gate_up, down = SecondMoment(mlp.gate_proj.in_features), SecondMoment(mlp.down_proj.in_features)
    handles = [
        mlp.gate_proj.register_forward_pre_hook(lambda _, args: gate_up.add(_flat(args[0]))),
        mlp.down_proj.register_forward_pre_hook(lambda _, args: down.add(_flat(args[0]))),
    ]
    with hooked(handles):
        for start in range(0, hidden.shape[0], BATCH):
            batch = hidden[start : start + BATCH]
            batch.copy_(stream.run(layer, batch))
            tick(batch.shape[0])
    return LayerMoments(gate_up.mean(), down.mean(), gate_up.count)


def output_metrics(stream: LayerStream, windows: torch.Tensor, tick: Callable[[int], None]) -> list[LayerMetrics]:
    """Token-wise second moments of dL/dy at every projection's output, L the summed next-token loss over `windows [n, S]`.

    Layer by layer both ways: the forward pass keeps each layer's input, the backward pass recomputes one layer at a time.
    """
    inputs = [stream.embed(windows)]
    with torch.no_grad():
        for index in range(stream.num_layers):
            layer = stream.load(index)
            inputs.append(torch.cat([stream.run(layer, batch) for batch in inputs[-1].split(BATCH)]))
            stream.release(index)
            tick(1)
    gradient = _loss_gradient(stream, inputs.pop(), windows)
    metrics: list[LayerMetrics] = []
    for index in reversed(range(stream.num_layers)):
        layer = stream.load(index)
        metrics.insert(0, _layer_metrics(stream, layer, inputs.pop(), gradient))
        stream.release(index)
        tick(2)
    return metrics


def _loss_gradient(stream: LayerStream, hidden: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    head, gradients = stream.head(), []
    for states, ids in zip(hidden, windows, strict=True):
        leaf = states.detach().requires_grad_()
        F.cross_entropy(head(leaf[:-1]), ids[1:], reduction="sum").backward()
        gradients.append(leaf.grad)
    return torch.stack(gradients)


def _layer_metrics(stream: LayerStream, layer: nn.Module, hidden: torch.Tensor, gradient: torch.Tensor) -> LayerMetrics:
    """Back-propagate `gradient` through one layer in place, and collect the metrics on the way."""
    mlp: Any = layer.mlp
    squares = {name: torch.zeros(getattr(mlp, name).out_features, dtype=torch.float64) for name in ("gate_proj", "up_proj")}
    full = SecondMoment(mlp.down_proj.out_features)

    def collect(name: str, gradient: torch.Tensor) -> None:  # a tensor hook that returns something would replace the gradient
        if name == "down_proj":
            full.add(_flat(gradient))
        else:
            squares[name] += _flat(gradient).square().sum(0)

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: collect(name, gradient))

        return hook

    with hooked([getattr(mlp, name).register_forward_hook(watch(name)) for name in ("gate_proj", "up_proj", "down_proj")]):
        for start in range(0, hidden.shape[0], BATCH):
            leaf = hidden[start : start + BATCH].detach().requires_grad_()
            stream.run(layer, leaf).backward(gradient[start : start + BATCH])
            assert leaf.grad is not None
            gradient[start : start + BATCH] = leaf.grad
    down = full.mean()
    down += DAMPING * down.diagonal().mean() * torch.eye(down.shape[0], dtype=down.dtype)
    return LayerMetrics(squares["gate_proj"] / full.count, squares["up_proj"] / full.count, down)
