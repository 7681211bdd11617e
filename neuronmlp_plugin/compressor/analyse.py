"""First half of a run: statistics and decompositions of every layer, saved one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from neuronmlp_plugin.calibration.statistics import BATCH, LayerMetrics, LayerMoments, hooked, layer_moments, output_metrics
from neuronmlp_plugin.calibration.stream import LayerStream
from neuronmlp_plugin.calibration.text import spread
from neuronmlp_plugin.compressor.plan import Plan
from neuronmlp_plugin.compressor.progress import ProgressBars
from neuronmlp_plugin.compressor.workspace import Workspace
from neuronmlp_plugin.lowrank.decompose import Decomposition, decompose
from neuronmlp_plugin.models.projection import PROJECTIONS

SAMPLE_ROWS = 512  # held-out rows per layer on which the achieved error is measured


def layer_name(index: int) -> str:
    return f"layer-{index:05d}"


def load_decomposition(tensors: dict[str, torch.Tensor], projection: str) -> Decomposition:
    """A decomposition out of a saved layer."""
    return Decomposition(*(tensors[f"{projection}.{part}"] for part in ("left", "right", "energy")))


def analyse(plan: Plan, workspace: Workspace, bars: ProgressBars) -> None:
    """Bring `layer-*.safetensors` (decompositions, sampled inputs) and `metrics` into the workspace, skipping what is there."""
    stream = LayerStream(plan.base)
    if plan.settings.method == "two-sided" and not workspace.has("metrics"):
        with bars.stage("backward pass", 3 * stream.num_layers) as tick:
            windows = spread(plan.calibration, plan.metric_windows)
            workspace.save("metrics", _stack(output_metrics(stream, windows, tick)))
    start = next((i for i in range(stream.num_layers) if not workspace.has(layer_name(i))), stream.num_layers)
    if start == stream.num_layers:
        return
    hidden = _hidden_states(plan, workspace, stream, start)  # no rows at all for a method that uses no text
    with bars.stage("statistics and factors", (stream.num_layers - start) * max(len(hidden), 1)) as tick:
        for index in range(start, stream.num_layers):
            _analyse_layer(plan, workspace, stream, index, hidden, tick)
    workspace.drop(f"hidden-{stream.num_layers:05d}")


def _stack(metrics: list[LayerMetrics]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([getattr(m, name) for m in metrics]) for name in PROJECTIONS}


def _hidden_states(plan: Plan, workspace: Workspace, stream: LayerStream, start: int) -> torch.Tensor:
    """The input of layer `start` for all windows, calibration first: from the last finished layer, or the embedding."""
    if start:
        return workspace.load(f"hidden-{start:05d}")["hidden"]
    return stream.embed(torch.cat((plan.calibration, plan.judge)))


def _analyse_layer(
    plan: Plan, workspace: Workspace, stream: LayerStream, index: int, hidden: torch.Tensor, tick: Callable[[int], None]
) -> None:
    layer = stream.load(index)
    count = len(plan.calibration)
    samples = _sample_inputs(stream, layer, hidden[count:])
    moments = layer_moments(stream, layer, hidden[:count], tick) if count else None
    tensors = dict(samples)
    metrics = metrics_of(plan, workspace, index)
    for name in PROJECTIONS:
        weight = getattr(layer.mlp, name).weight
        found = decompose(weight, _moment(plan, moments, name), metrics.get(name))
        tensors |= {f"{name}.left": found.left.float(), f"{name}.right": found.right.float(), f"{name}.energy": found.energy}
    stream.release(index)
    workspace.save(f"hidden-{index + 1:05d}", {"hidden": hidden})
    workspace.save(layer_name(index), tensors)
    workspace.drop(f"hidden-{index:05d}")
    tick(len(hidden) - count)


def metrics_of(plan: Plan, workspace: Workspace, index: int) -> dict[str, torch.Tensor]:
    """The output metric of each projection of a layer; empty for a method that uses none."""
    if plan.settings.method != "two-sided":
        return {}
    return workspace.load_row("metrics", index)


def _moment(plan: Plan, moments: LayerMoments | None, name: str) -> torch.Tensor | None:
    if moments is None or plan.settings.method == "plain":
        return None
    return moments.down if name == "down_proj" else moments.gate_up


@torch.no_grad()
def _sample_inputs(stream: LayerStream, layer: torch.nn.Module, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Evenly spread rows of what gate/up and down see on the held-out windows; runs them through the layer in place."""
    seen: dict[str, list[torch.Tensor]] = {"gate_up.sample": [], "down.sample": []}
    mlp: Any = layer.mlp
    handles = [
        module.register_forward_pre_hook(lambda _, args, key=key: seen[key].append(args[0].reshape(-1, args[0].shape[-1])))
        for module, key in ((mlp.gate_proj, "gate_up.sample"), (mlp.down_proj, "down.sample"))
    ]
    with hooked(handles):
        for batch in hidden.split(BATCH) if len(hidden) else ():
            batch.copy_(stream.run(layer, batch))
    rows = {key: torch.cat(parts) for key, parts in seen.items() if parts}
    return {key: x[:: max(1, len(x) // SAMPLE_ROWS)][:SAMPLE_ROWS] for key, x in rows.items()}
