"""First stage of a run: the statistics of every layer, saved one by one, so that neither memory nor lost work
grows with the model.

One forward pass over all windows: the moments of each layer's inputs, and files of what the rest begins
from: each layer's input for the metric windows, the gradient at the end, and the judged windows' last hidden
states. Then backward, from the last layer to the first: each layer's output metrics.
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

JUDGED = "judged"  # file of the judged windows' hidden states after the dense model's last layer
SAMPLE_ROWS = 512  # held-out rows per layer on which the achieved error is measured


def layer_name(index: int) -> str:
    return f"layer-{index:05d}"


def analyse(plan: Plan, workspace: Workspace, bars: ProgressBars, workers: Workers) -> None:
    """Bring `layer-*` (input moments, sampled inputs), `metrics-*` of every layer and `JUDGED` into the
    workspace, skipping what is there.
    """
    stream, files = LayerStream(plan.base, device=workers.device), _Files(workspace, workers)
    start = _first_layer(plan, files, stream.num_layers)
    if start < stream.num_layers:
        forward_pass(plan, files, stream, start, bars)
    if not workspace.has(JUDGED):
        _end_forward(plan, files, stream)
    files.drop("hidden", stream.num_layers)
    backward_pass(plan, files, stream, bars)


class _Files:
    """What this process keeps between layers: `hidden i` of all its windows before layer i, `input i` of the
    metric windows among them, `gradient i` with respect to it.
    """

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


def _first_layer(plan: Plan, files: _Files, last: int) -> int:
    """Where the forward pass goes on; `last` where it is finished. With another number of processes than
    before, none of which finds its files, it begins anew.
    """
    start = next((i for i in range(last) if not files.workspace.has(layer_name(i))), last)
    if files.has("hidden", start):
        return start
    missing = _missing_metrics(plan, files.workspace)
    whole = start == last and files.workspace.has(JUDGED)
    return last if whole and (not missing or files.has("gradient", missing[-1] + 1)) else 0


def _missing_metrics(plan: Plan, workspace: Workspace) -> list[int]:
    wanted = range(plan.shape.num_layers if plan.metric_windows else 0)
    return [index for index in wanted if not workspace.has(metrics_name(index))]


def _metric_places(plan: Plan, workers: Workers) -> torch.Tensor:
    """Which of this process's calibration windows go through the backward pass."""
    places = torch.arange(len(plan.calibration))
    chosen = spread(places, plan.metric_windows) if plan.metric_windows else places[:0]
    return torch.isin(workers.share(places), chosen).nonzero()[:, 0]


def forward_pass(plan: Plan, files: _Files, stream: LayerStream, start: int, bars: ProgressBars) -> None:
    """`layer-*` from layer `start` on, and the files of the backward pass; leaves `hidden` of the end."""
    workers = files.workers
    if files.has("hidden", start):
        hidden = files.load("hidden", start)
    else:
        for name in (JUDGED, *map(layer_name, range(stream.num_layers))):  # of another number of processes
            files.workspace.drop(name)
        windows = workers.share(plan.calibration)
        hidden = stream.embed(torch.cat([windows, plan.judge] if workers.is_first else [windows]))
    with bars.stage("statistics", (stream.num_layers - start) * max(len(hidden), 1)) as tick:
        for index in range(start, stream.num_layers):
            _analyse_layer(plan, files, stream, index, hidden, tick)


def _analyse_layer(
    plan: Plan,
    files: _Files,
    stream: LayerStream,
    index: int,
    hidden: torch.Tensor,
    tick: Callable[[int], None],
) -> None:
    layer, workers = stream.load(index), files.workers
    count = len(workers.share(plan.calibration))
    if plan.metric_windows:
        files.save("input", index, hidden[_metric_places(plan, workers)])
    samples = _sample_inputs(stream, layer, hidden[count:])
    moments = layer_moments(stream, layer, hidden[:count], tick, workers) if count else None
    files.save("hidden", index + 1, hidden)
    workers.wait()  # a finished layer says that every process can go on behind it
    if workers.is_first:
        files.workspace.save(layer_name(index), samples | _moments(plan, moments))
    stream.release(index)
    workers.wait()  # what led here is dropped only when the layer is on disk
    files.drop("hidden", index)
    tick(len(hidden) - count)


def _end_forward(plan: Plan, files: _Files, stream: LayerStream) -> None:
    """From the last hidden states: what the judge compares with, and the gradient that goes backward."""
    workers, last = files.workers, stream.num_layers
    windows, places = workers.share(plan.calibration), _metric_places(plan, workers)
    if plan.metric_windows:
        hidden = files.load("hidden", last)[places]  # a copy: the others make room
        files.save("gradient", last, loss_gradient(stream, hidden, windows[places]))
    workers.wait()  # `JUDGED` says that every process can go on from here
    if workers.is_first:
        files.workspace.save(JUDGED, {"hidden": files.load("hidden", last)[len(windows) :].clone()})
    workers.wait()  # what led here is dropped only when that is on disk


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


def backward_pass(plan: Plan, files: _Files, stream: LayerStream, bars: ProgressBars) -> None:
    """Bring `metrics-*` of every layer into the workspace, from the last layer to the first, skipping what is
    there.
    """
    missing = _missing_metrics(plan, files.workspace)
    if not missing:
        return
    # Metrics are made from the last layer on: what is behind the last missing one is there, but for another
    # number of processes than before.
    if not files.has("gradient", missing[-1] + 1):
        missing = list(range(stream.num_layers))
    with bars.stage("backward pass", len(missing)) as tick:
        for index in reversed(missing):
            _layer(stream, files, index)
            tick(1)


def _layer(stream: LayerStream, files: _Files, index: int) -> None:
    gradient, workers = files.load("gradient", index + 1), files.workers
    metrics = layer_metrics(stream, stream.load(index), files.load("input", index), gradient, workers)
    stream.release(index)
    files.save("gradient", index, gradient)
    workers.wait()  # the metrics say that every process can go on from here
    if workers.is_first:
        files.workspace.save(metrics_name(index), dict(vars(metrics)))
    workers.wait()  # what led here is dropped only when the metrics are on disk
    files.drop("gradient", index + 1)
    files.drop("input", index)
    # Nothing lies before layer 0 that would ask for its gradient.
    if index == 0:
        files.drop("gradient", 0)
