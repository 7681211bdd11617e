"""Carry a plan out: analyse, choose ranks, build, write, judge, report. What is finished is never done again."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from neuronmlp_plugin.calibration.quality import compare
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE
from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.checkpoint.writer import layer_prefix, save_json, shard_name, write_factor_file, write_layer, write_rest
from neuronmlp_plugin.compressor.analyse import analyse
from neuronmlp_plugin.compressor.build import BuiltLayer, Layer, build_layer, choose_ranks, read_curves
from neuronmlp_plugin.compressor.errors import MatrixError, matrix_errors
from neuronmlp_plugin.compressor.plan import Plan, describe
from neuronmlp_plugin.compressor.progress import ProgressBars
from neuronmlp_plugin.compressor.report import REPORT_FILE, loss_by_size, write_plots
from neuronmlp_plugin.compressor.workspace import Workspace
from neuronmlp_plugin.models.projection import PROJECTIONS, ProjectionSpec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def compress(plan: Plan, bars: ProgressBars) -> dict[str, Any]:
    """Compress as planned into `plan.target`, which appears whole or not at all; returns the report.

    An interrupted run goes on from its last finished layer, to an identical result.
    """
    workspace = Workspace(plan.work, plan.fingerprint())
    analyse(plan, workspace, bars)
    curves = read_curves(plan, workspace)
    records = _build_layers(plan, workspace, choose_ranks(plan, curves), bars)
    block = FormatBlock(tuple(_specs(record) for record in records), plan.shape, describe(plan), _created_by())
    _write_whole(plan, workspace, block)
    report = {
        "block": block.to_json(),
        "matrices": [row for record in records for row in record["matrices"]],
        "notes": [note for record in records for note in record["notes"]],
        "quality": _judge(plan, workspace, bars),
        "loss_by_size": loss_by_size(curves, plan.settings),
    }
    save_json(workspace.result / REPORT_FILE, report)
    write_plots(report, workspace.result)
    workspace.finish(plan.target)
    return report


def _created_by() -> str:
    from neuronmlp_plugin import __version__

    return f"neuronmlp {__version__}"


def _specs(record: dict[str, Any]) -> Layer:
    return {name: ProjectionSpec(**record["specs"][name]) for name in PROJECTIONS}


def _build_layers(plan: Plan, workspace: Workspace, chosen: list[Layer], bars: ProgressBars) -> list[dict[str, Any]]:
    """Write each layer's tensors and return one record a layer; both are skipped where an earlier run left them."""
    records = []
    with bars.stage("pivots and writing", plan.shape.num_layers) as tick:
        for index, specs in enumerate(chosen):
            path = workspace.path / f"built-{index:05d}.json"
            if not path.is_file():
                built = build_layer(plan, workspace, index, specs, _dtype(plan))
                _write_layer(plan, workspace, index, built)
                save_json(path, _record(plan, workspace, index, built))
            records.append(json.loads(path.read_text(encoding="utf-8")))
            tick(1)
    return records


def _dtype(plan: Plan) -> torch.dtype:
    chosen = plan.settings.dtype
    return DTYPES[chosen] if chosen != "auto" else plan.base.tensor("model.layers.0.mlp.gate_proj.weight").dtype


def _write_layer(plan: Plan, workspace: Workspace, index: int, built: BuiltLayer) -> None:
    factors = {f"{layer_prefix(index)}mlp.{name}": tensor for name, tensor in built.tensors.items()}
    if plan.settings.factors_only:
        workspace.save(f"factors-{index:05d}", factors)
    else:
        write_layer(workspace.result, plan.base, index, factors)


def _record(plan: Plan, workspace: Workspace, index: int, built: BuiltLayer) -> dict[str, Any]:
    errors: list[MatrixError] = matrix_errors(plan, workspace, index, built)
    return {
        "specs": {name: spec.to_json() for name, spec in built.specs.items()},
        "notes": built.notes,
        "matrices": [dataclasses.asdict(error) for error in errors],
    }


def _write_whole(plan: Plan, workspace: Workspace, block: FormatBlock) -> None:
    if not plan.settings.factors_only:
        write_rest(workspace.result, plan.base, block)
        return
    names = block.expected_tensors(only_changed=True)
    tensors = {}
    for index in range(plan.shape.num_layers):
        tensors |= {name: t for name, t in workspace.load(f"factors-{index:05d}").items() if name in names}
    write_factor_file(workspace.result / FACTOR_FILE.name, block, tensors)


def _judge(plan: Plan, workspace: Workspace, bars: ProgressBars) -> dict[str, float] | None:
    """Quality of what will be served against the dense model, on text that was not calibrated on."""
    if not len(plan.judge):
        return None
    dense = load_model(plan.base.folder)
    if plan.settings.factors_only:
        candidate = load_model(plan.base.folder, factors=workspace.result / FACTOR_FILE.name)
    else:
        candidate = load_model(workspace.result)
    with bars.stage("quality", len(plan.judge)) as tick:
        return compare(dense, candidate, plan.judge, tick).to_json()
