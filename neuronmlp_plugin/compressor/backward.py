"""The backward pass: the output metrics of every layer, through files, so that neither memory nor lost work
grows with the model.

Forward, each layer's input is kept as a file; backward, each layer's gradient and metrics. Every layer that
is done stays done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from neuronmlp_plugin.calibration.statistics import layer_metrics, loss_gradient, run_in_place
from neuronmlp_plugin.calibration.stream import LayerStream
from neuronmlp_plugin.calibration.text import spread
from neuronmlp_plugin.calibration.workers import Workers
from neuronmlp_plugin.compressor.plan import Plan
from neuronmlp_plugin.compressor.progress import ProgressBars
from neuronmlp_plugin.compressor.workspace import Workspace


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
        if not files.has(
            "gradient", missing[-1] + 1
        ):  # the beginning, or another number of processes than before
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
    if index == 0:
        files.drop("gradient", 0)
