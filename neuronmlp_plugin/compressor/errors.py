"""What the analysis predicted for a matrix, against what its stored factors do on rows that it never saw."""

from __future__ import annotations

import dataclasses

import torch

from neuronmlp_plugin.compressor.analyse import layer_name, load_decomposition, metrics_of
from neuronmlp_plugin.compressor.build import BuiltLayer
from neuronmlp_plugin.compressor.plan import Plan
from neuronmlp_plugin.compressor.workspace import Workspace
from neuronmlp_plugin.lowrank.decompose import metric_norm
from neuronmlp_plugin.models.definition import build_linear
from neuronmlp_plugin.models.factors import PROJECTIONS, MLPLayer


@dataclasses.dataclass(frozen=True)
class MatrixError:
    """One projection. Errors are relative output errors sqrt(E|G^1/2 (W - W') x|^2 / E|G^1/2 W x|^2) in the
    metric of the method.

    `predicted_loss`: the numerator squared, on the calibration moment, which the allocation adds up over
    matrices.
    `achieved_error`: of the factors as stored, on held-out rows; None where no text was kept to judge on.
    `rounding`: relative change of the matrix itself from storing the factors in their dtype.
    """

    layer: int
    projection: str
    form: str
    rank: int | None
    parameters: int
    predicted_loss: float
    predicted_error: float
    achieved_error: float | None
    rounding: float


def matrix_errors(plan: Plan, workspace: Workspace, index: int, built: BuiltLayer) -> list[MatrixError]:
    """The three rows of one built layer."""
    saved = workspace.load(layer_name(index))
    metrics = metrics_of(plan, workspace, index)
    layer = MLPLayer.of(plan.shape, built.specs)
    rows = []
    for name in PROJECTIONS:
        spec = built.specs[name]
        tail = load_decomposition(saved, name).tail()
        loss = 0.0 if spec.rank is None else float(tail[spec.rank])
        achieved = 0.0 if spec.rank is None else _achieved(plan, saved, index, name, built, metrics.get(name))
        predicted = (loss / max(float(tail[0]), 1e-300)) ** 0.5
        size = layer.matrix(name).parameters
        rows.append(
            MatrixError(
                index,
                name,
                spec.form,
                spec.rank,
                size,
                loss,
                predicted,
                achieved,
                built.rounding.get(name, 0.0),
            )
        )
    return rows


@torch.no_grad()
def _achieved(
    plan: Plan,
    saved: dict[str, torch.Tensor],
    index: int,
    name: str,
    built: BuiltLayer,
    metric: torch.Tensor | None,
) -> float | None:
    """Outputs are compared through the layer's channel order: down's inputs are permuted, gate and up's
    outputs are put back.
    """
    rows = saved.get("down.sample" if name == "down_proj" else "gate_up.sample")
    if rows is None:
        return None
    module = build_linear(MLPLayer.of(plan.shape, built.specs).matrix(name))
    prefix = f"{name}."
    module.load_state_dict(
        {key.removeprefix(prefix): t.float() for key, t in built.tensors.items() if key.startswith(prefix)}
    )
    order = built.order
    exact = rows @ plan.base.tensor(f"model.layers.{index}.mlp.{name}.weight").float().T
    if name == "down_proj":
        stored = module(rows if order is None else rows[:, order])
    else:
        stored = module(rows)
        if order is not None:
            stored = stored[:, torch.argsort(order)]
    return metric_norm(exact - stored, metric) / max(
        metric_norm(exact, metric), 1e-300
    )  # a matrix of zeros has no error
