"""First stage of a run: the statistics of every layer, saved one by one, so that neither memory nor lost work
grows with the model.

First the backward pass: forward, each layer's input is kept as a file; backward, each layer's gradient and
output metrics. Then the moments of each layer's inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from neuronmlp_plugin.calibration.layer_stream import LayerStream
from neuronmlp_plugin.calibration.statistics import (
    LayerMoments,
    hooked,
    layer_metrics,
    layer_moments,
    loss_gradient,
    run_in_place,
)
from neuronmlp_plugin.calibration.text import spread
from neuronmlp_plugin.calibration.workers import Workers
from neuronmlp_plugin.compressor.job import ProgressBars, Workspace
from neuronmlp_plugin.compressor.plan import Plan

SAMPLE_ROWS = 512  # held-out rows per layer on which the achieved error is measured


def layer_name(index: int) -> str:
    return f"layer-{index:05d}"


def analyse(plan: Plan, workspace: Workspace, bars: ProgressBars, workers: Workers) -> None:
    """Bring `layer-*` (input moments, sampled inputs) and `metrics-*` of every layer into the workspace,
    skipping what is there.
    """
    stream = LayerStream(plan.base, device=workers.device)
    if plan.settings.method == "two-sided":
        backward_pass(plan, workspace, stream, bars, workers)
    # Layers are finished in order, so behind the first that is missing all are.
    start = next((i for i in range(stream.num_layers) if not workspace.has(layer_name(i))), stream.num_layers)
    if start == stream.num_layers:
        return
    windows = workers.share(plan.calibration)
    parts = [windows, plan.judge] if workers.is_first else [windows]
    hidden = _hidden_states(workspace, stream, start, parts, workers)
    with bars.stage("statistics", (stream.num_layers - start) * max(len(hidden), 1)) as tick:
        for index in range(start, stream.num_layers):
            _analyse_layer(plan, workspace, stream, index, hidden, tick, workers)
    workspace.drop(workers.own(hidden_name(stream.num_layers)))


def _hidden_states(
    workspace: Workspace, stream: LayerStream, start: int, parts: list[torch.Tensor], workers: Workers
) -> torch.Tensor:
    """The input of layer `start` for all windows of `parts` (none for a method that uses no text): as left by
    the last finished layer.
    """
    name = workers.own(hidden_name(start))
    if workspace.has(name):
        return workspace.load(name)["hidden"]
    hidden = stream.embed(torch.cat(parts))
    for index in range(start):  # only where a run goes on with another number of processes
        layer = stream.load(index)
        for part in hidden.split([len(part) for part in parts]):
            run_in_place(stream, layer, part)
        stream.release(index)
    return hidden


def hidden_name(index: int) -> str:
    return f"hidden-{index:05d}"


def _analyse_layer(
    plan: Plan,
    workspace: Workspace,
    stream: LayerStream,
    index: int,
    hidden: torch.Tensor,
    tick: Callable[[int], None],
    workers: Workers,
) -> None:
    layer = stream.load(index)
    count = len(workers.share(plan.calibration))
    samples = _sample_inputs(stream, layer, hidden[count:])
    moments = layer_moments(stream, layer, hidden[:count], tick, workers) if count else None
    workspace.save(workers.own(hidden_name(index + 1)), {"hidden": hidden})
    workers.wait()  # a finished layer says that every process can go on behind it
    if workers.is_first:
        workspace.save(layer_name(index), samples | _moments(plan, moments))
    stream.release(index)
    workers.wait()  # what led here is dropped only when the layer is on disk
    workspace.drop(workers.own(hidden_name(index)))
    tick(len(hidden) - count)


def _moments(plan: Plan, moments: LayerMoments | None) -> dict[str, torch.Tensor]:
    """E[x x^T] of the layer's input and of down's, fp32: half of the room, and rounding is far below what a
    finite text leaves open.
    """
    if moments is None or plan.settings.method == "plain":
        return {}
    tokens = torch.tensor(moments.num_tokens)
    return {"inputs": moments.gate_up.float(), "channels": moments.down.float(), "tokens": tokens}


def metrics_of(plan: Plan, workspace: Workspace, index: int) -> dict[str, torch.Tensor]:
    """The output metric of each projection of a layer; empty for a method that uses none."""
    if plan.settings.method != "two-sided":
        return {}
    return workspace.load(metrics_name(index))


@torch.no_grad()
def _sample_inputs(
    stream: LayerStream, layer: torch.nn.Module, hidden: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Evenly spread rows of what gate/up and down see on the held-out windows; runs them through the layer in
    place.
    """
    mlp: Any = layer.mlp
    modules = {"gate_up.sample": mlp.gate_proj, "down.sample": mlp.down_proj}
    seen: dict[str, list[torch.Tensor]] = {key: [] for key in modules}
    passed = dict.fromkeys(modules, 0)
    step = max(1, hidden[..., 0].numel() // SAMPLE_ROWS)

    def keep(key: str, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        # Every step-th row of all that pass, wherever in a step this batch begins.
        seen[key].append(rows[-passed[key] % step :: step].cpu().clone())  # a view would keep all rows alive
        passed[key] += len(rows)

    handles = [
        module.register_forward_pre_hook(lambda _, args, key=key: keep(key, args[0]))
        for key, module in modules.items()
    ]
    with hooked(handles):
        run_in_place(stream, layer, hidden)
    return {key: torch.cat(parts)[:SAMPLE_ROWS] for key, parts in seen.items() if parts}


def metrics_name(index: int) -> str:
    return f"metrics-{index:05d}"


def backward_pass(
    plan: Plan, workspace: Workspace, stream: LayerStream, bars: ProgressBars, workers: Workers
) -> None:
    """Bring `metrics-*` of every layer into the workspace, from the last layer to the first, skipping what is
    there.
    """
    missing = [i for i in range(stream.num_layers) if not workspace.has(metrics_name(i))]
    if not missing:
        return
    windows = workers.share(spread(plan.calibration, plan.metric_windows))
    files = _Files(workspace, workers)
    with bars.stage("backward pass", 3 * stream.num_layers) as tick:
        # Metrics are made from the last layer on: what is behind the last missing one is there, but for this.
        # The beginning, or another number of processes than before.
        if not files.has("gradient", missing[-1] + 1):
            missing = list(range(stream.num_layers))
            _forward(stream, files, windows, tick)
        for index in reversed(missing):
            _layer(stream, workspace, files, index, workers)
            tick(2)


class _Files:
    """What this process keeps between layers: `input i` of layer i, `gradient i` with respect to it."""

    def __init__(self, workspace: Workspace, workers: Workers) -> None:
        self.workspace, self.workers = workspace, workers

    def _name(self, what: str, index: int) -> str:
        return self.workers.own(f"{what}-{index:05d}")

    def has(self, what: str, index: int) -> bool:
        return self.workspace.has(self._name(what, index))

    def save(self, what: str, index: int, hidden: torch.Tensor) -> None:
        self.workspace.save(self._name(what, index), {what: hidden})

    def load(self, what: str, index: int) -> torch.Tensor:
        return self.workspace.load(self._name(what, index))[what]

    def drop(self, what: str, index: int) -> None:
        self.workspace.drop(self._name(what, index))


def _forward(stream: LayerStream, files: _Files, windows: torch.Tensor, tick: Callable[[int], None]) -> None:
    """Save the input of every layer, and the gradient at the end; goes on from the last input that is
    there.
    """
    last = stream.num_layers
    start = next((i for i in reversed(range(last + 1)) if files.has("input", i)), 0)
    if not files.has("input", start):
        files.save("input", start, stream.embed(windows))
    hidden = files.load("input", start)
    for index in range(start, last):
        run_in_place(stream, stream.load(index), hidden)
        stream.release(index)
        files.save("input", index + 1, hidden)
        tick(1)
    files.save("gradient", last, loss_gradient(stream, hidden, windows))
    files.drop("input", last)


def _layer(stream: LayerStream, workspace: Workspace, files: _Files, index: int, workers: Workers) -> None:
    gradient = files.load("gradient", index + 1)
    metrics = layer_metrics(stream, stream.load(index), files.load("input", index), gradient, workers)
    stream.release(index)
    files.save("gradient", index, gradient)
    workers.wait()  # the metrics say that every process can go on from here
    if workers.is_first:
        workspace.save(metrics_name(index), dict(vars(metrics)))
    workers.wait()  # what led here is dropped only when the metrics are on disk
    files.drop("gradient", index + 1)
    files.drop("input", index)
    # Nothing lies before layer 0 that would ask for its gradient.
    if index == 0:
        files.drop("gradient", 0)
