"""Second half of a run: ranks for all matrices, then the tensors of each layer in the form that is served."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from neuronmlp_plugin.compressor.analyse import layer_name, load_decomposition
from neuronmlp_plugin.compressor.plan import Plan
from neuronmlp_plugin.compressor.settings import Settings
from neuronmlp_plugin.compressor.workspace import Workspace
from neuronmlp_plugin.lowrank.allocate import CHOOSERS, Curve, cost
from neuronmlp_plugin.lowrank.decompose import Decomposition
from neuronmlp_plugin.lowrank.pivots import common_order, pivot_inputs, pivot_outputs
from neuronmlp_plugin.models.factors import DENSE, PROJECTIONS, ProjectionSpec

# A compact matrix is refused where rounding to the stored dtype alone moves it by more than this share (bf16
# with good pivots: 0.3-1 %).
ROUNDING_LIMIT = 0.03
Layer = dict[str, ProjectionSpec]


@dataclasses.dataclass(frozen=True)
class BuiltLayer:
    """One layer ready to be written: tensors by `projection.suffix`, the forms they really have, and what was
    noticed.
    """

    tensors: dict[str, torch.Tensor]
    specs: Layer
    rounding: dict[str, float]  # relative change of the matrix from storing its factors in their dtype
    notes: list[str]
    order: torch.Tensor | None  # of the intermediate channels; None is the base's own


def read_curves(plan: Plan, workspace: Workspace) -> list[Curve]:
    """The loss curve of every matrix, layer by layer in the order of PROJECTIONS."""
    curves = []
    for index in range(plan.shape.num_layers):
        tensors = workspace.load(layer_name(index))
        for name in PROJECTIONS:
            n_in, n_out = plan.shape.in_out(name)
            curves.append(Curve(n_out, n_in, load_decomposition(tensors, name).tail().numpy()))
    return curves


def priced(curves: list[Curve], prices: dict[str, np.ndarray]) -> list[Curve]:
    """The same curves with `prices[projection]` in place of parameters."""
    per_layer = len(PROJECTIONS)
    return [
        dataclasses.replace(curve, prices=prices[PROJECTIONS[i % per_layer]])
        for i, curve in enumerate(curves)
    ]


def choose_ranks(settings: Settings, curves: list[Curve], keep: float) -> list[Layer]:
    """A spec for every projection of every layer, for `keep` of the dense cost."""
    ranks = CHOOSERS[settings.allocation](curves, keep, settings.form, settings.rank_multiple)
    specs = [DENSE if rank is None else ProjectionSpec(settings.form, rank) for rank in ranks]
    return [dict(zip(PROJECTIONS, specs[i : i + 3], strict=True)) for i in range(0, len(specs), 3)]


def build_layer(plan: Plan, workspace: Workspace, index: int, specs: Layer, dtype: torch.dtype) -> BuiltLayer:
    """Truncate, permute the intermediate channels, pivot, and cast one layer."""
    dense = [name for name, spec in specs.items() if spec.form == "dense"]
    weights = {name: plan.base.tensor(f"model.layers.{index}.mlp.{name}.weight") for name in dense}
    if len(dense) == len(specs):
        return BuiltLayer({f"{name}.weight": w for name, w in weights.items()}, specs, {}, [], None)
    saved = workspace.load(layer_name(index))
    factors = {
        n: _factors(load_decomposition(saved, n), spec) for n, spec in specs.items() if spec.form != "dense"
    }
    order = _order(factors, specs)
    result = BuiltLayer({}, {}, {}, [], order)
    for name, spec in specs.items():
        if spec.form == "dense":
            weight = weights[name] if order is None else _permuted(name, weights[name], order)
            stored, real = {"weight": weight}, spec
        else:
            stored, real, rounding, note = _store(
                name, spec, _permuted_factors(name, factors[name], order), dtype
            )
            result.rounding[name] = rounding
            result.notes.extend([f"layer {index} {name}: {note}"] if note else [])
        result.specs[name] = real
        result.tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in stored.items()})
    return result


def _factors(decomposition: Decomposition, spec: ProjectionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    assert spec.rank is not None
    first, second = decomposition.truncate(spec.rank)
    return first.double(), second.double()


def _order(factors: dict[str, tuple[torch.Tensor, torch.Tensor]], specs: Layer) -> torch.Tensor | None:
    """The common order of the intermediate channels, or None where nothing is compact."""
    bases = [
        factors[n][0].T if n == "down_proj" else factors[n][1]
        for n, spec in specs.items()
        if spec.form == "compact"
    ]
    return common_order(bases) if bases else None


def _permuted(name: str, weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return weight[:, order] if name == "down_proj" else weight[order]


def _permuted_factors(
    name: str, pair: tuple[torch.Tensor, torch.Tensor], order: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if order is None:
        return pair
    first, second = pair
    return (first[:, order], second) if name == "down_proj" else (first, second[order])


Stored = tuple[dict[str, torch.Tensor], ProjectionSpec, float, str]


def _store(
    name: str, spec: ProjectionSpec, pair: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> Stored:
    """Tensors of one matrix in `dtype`, falling back from `compact` to `uv` at equal bytes where the pivots
    are not good enough.
    """
    first, second = pair
    if spec.form == "compact":
        try:
            compact, rounding = _compact(name, first, second, dtype)
        except torch.linalg.LinAlgError:  # singular pivots: the matrix has a lower rank than it was given
            compact, rounding = {}, math.inf
        if rounding <= ROUNDING_LIMIT:
            return compact, spec, rounding, ""
        n_in, n_out, rank = first.shape[1], second.shape[0], spec.rank or 0
        affordable = max(1, cost(rank, n_in, n_out, "compact") // (n_in + n_out))
        note = f"pivots too weak (rounding {rounding:.1%}), stored as uv of rank {affordable} instead of compact of rank {rank}"
        first, second, spec = first[:affordable], second[:, :affordable], ProjectionSpec("uv", affordable)
    else:
        note = ""
    stored = {"u.weight": first.to(dtype), "v.weight": second.to(dtype)}
    return (
        stored,
        spec,
        _change(second @ first, stored["v.weight"].double() @ stored["u.weight"].double()),
        note,
    )


def _compact(
    name: str, first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], float]:
    rank, exact = first.shape[0], second @ first
    eye = torch.eye(rank, dtype=torch.float64)
    if name == "down_proj":
        c, v = (x.to(dtype) for x in pivot_inputs(first, second))
        return {"c.weight": c, "v.weight": v}, _change(exact, v.double() @ torch.cat((eye, c.double()), 1))
    u, c = (x.to(dtype) for x in pivot_outputs(first, second))
    return {"u.weight": u, "c.weight": c}, _change(exact, torch.cat((eye, c.double())) @ u.double())


def _change(exact: torch.Tensor, stored: torch.Tensor) -> float:
    """Relative Frobenius distance; infinite where the stored matrix is not finite."""
    distance = float((exact - stored).norm() / exact.norm().clamp_min(1e-300))
    return distance if math.isfinite(distance) else math.inf
