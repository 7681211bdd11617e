"""From a choice to what is stored: tensors of each layer in the form that is served, and what they lose."""

from __future__ import annotations

import dataclasses
import math

import torch

from neuronmlp_plugin.compressor.analyse import layer_name
from neuronmlp_plugin.compressor.job import Workspace
from neuronmlp_plugin.compressor.offers import FactoredLayer, Pair
from neuronmlp_plugin.compressor.plan import Plan
from neuronmlp_plugin.errors import NonFiniteError
from neuronmlp_plugin.lowrank.allocate import Choice, cost
from neuronmlp_plugin.lowrank.decompose import metric_norm
from neuronmlp_plugin.lowrank.pivots import common_order, pivot_inputs, pivot_outputs
from neuronmlp_plugin.models.definition import build_linear, tensors_of
from neuronmlp_plugin.models.factors import DENSE, PROJECTIONS, Matrix, MLPLayer, ProjectionSpec

# A compact matrix is refused where rounding to the stored dtype alone moves it by more than this share (bf16
# with good pivots: 0.3-1 %).
ROUNDING_LIMIT = 0.03


@dataclasses.dataclass(frozen=True)
class BuiltLayer:
    """One layer ready to be written: tensors by `projection.suffix`, the forms they really have, and what was
    noticed.
    """

    tensors: dict[str, torch.Tensor]
    layer: MLPLayer
    rounding: dict[str, float]  # relative change of the matrix from storing its factors in their dtype
    notes: list[str]
    channels: torch.Tensor  # of the base, in the order that is stored
    order: torch.Tensor  # the same, as places among those of the factored layer


@dataclasses.dataclass(frozen=True)
class MatrixError:
    """One projection. Errors are relative output errors sqrt(E|G^1/2 (W - W') x|^2 / E|G^1/2 W x|^2) in the
    metric of the method; channels removed are down's error.

    `predicted_loss`: the numerator squared, on the calibration moment, which the allocation adds up over
    matrices.
    `achieved_error`: of the factors as stored, on held-out rows; None where no text was kept to judge on.
    `rounding`: relative change of the matrix itself from storing the factors in their dtype.
    """

    layer: int
    projection: str
    form: str
    rank: int | None
    channels: int
    parameters: int
    predicted_loss: float
    predicted_error: float
    achieved_error: float | None
    rounding: float


def layer_of(plan: Plan, choice: Choice) -> MLPLayer:
    """The stored layer that a choice asks for."""
    specs = [DENSE if rank is None else ProjectionSpec(plan.settings.form, rank) for rank in choice.ranks]
    named = dict(zip(PROJECTIONS, specs, strict=True))
    return MLPLayer.of(plan.shape, named, channels=choice.kept, groups=plan.groups)


def untouched(plan: Plan, index: int) -> BuiltLayer:
    """The base model's own layer."""
    weights = {
        f"{name}.weight": plan.base.tensor(f"model.layers.{index}.mlp.{name}.weight") for name in PROJECTIONS
    }
    specs = dict.fromkeys(PROJECTIONS, DENSE)
    layer = MLPLayer.of(plan.shape, specs, groups=plan.groups)
    return BuiltLayer(weights, layer, {}, [], *[torch.arange(layer.channels)] * 2)


def build_layer(
    plan: Plan, index: int, factored: FactoredLayer, layer: MLPLayer, dtype: torch.dtype
) -> BuiltLayer:
    """Order the channels inside each group, pivot, and cast one layer."""
    order = _order(factored, layer)
    whole = torch.cat(order)
    # `whole` are places among the channels that were kept; through `factored.channels` they are the base's
    # own.
    built = BuiltLayer({}, layer, {}, [], factored.channels[whole], whole)
    specs: dict[str, ProjectionSpec] = dict(layer)
    for name, matrix in layer.matrices.items():
        pairs = factored.factors.get(name)
        if pairs is None:
            stored = {"weight": _dense(plan, index, factored, name, built, dtype)}
        else:
            permuted = [
                _permuted(pair, place, matrix.is_down)
                for pair, place in zip(pairs, _local(order), strict=True)
            ]
            stored, specs[name], built.rounding[name], note = _store(matrix, permuted, dtype)
            built.notes.extend([f"layer {index} {name}: {note}"] if note else [])
        built.tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in stored.items()})
    _check_finite(built, index, dtype)
    return dataclasses.replace(built, layer=layer.with_specs(specs))


def _check_finite(built: BuiltLayer, index: int, dtype: torch.dtype) -> None:
    for name, tensor in built.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"model.layers.{index}.mlp.{name}: expected finite values in "
                f"{str(dtype).removeprefix('torch.')}, found NaN or Inf; "
                "choose --dtype bfloat16 or float32."
            )


def _order(factored: FactoredLayer, layer: MLPLayer) -> list[torch.Tensor]:
    """Of every group, its places among the layer's channels in the order that is stored: its pivots first."""
    size, orders = layer.channels // layer.groups, []
    for group in range(layer.groups):
        # Of the side that has the channels: what down reads, what gate and up put out.
        bases = [
            pairs[group][0].T if name == "down_proj" else pairs[group][1]
            for name, pairs in factored.factors.items()
            if layer[name].form == "compact"
        ]
        orders.append(group * size + (common_order(bases) if bases else torch.arange(size)))
    return orders


def _local(order: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same, counted from the beginning of each group."""
    return [places - group * len(places) for group, places in enumerate(order)]


def _dense(
    plan: Plan,
    index: int,
    factored: FactoredLayer,
    name: str,
    built: BuiltLayer,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The base model's own numbers in another order, or down as it was repaired."""
    if name == "down_proj" and len(built.channels) < plan.shape.intermediate_size:
        return factored.weights[name][:, built.order].to(dtype)
    weight = plan.base.tensor(f"model.layers.{index}.mlp.{name}.weight")
    # Without a cast: the base's own numbers stay as they are.
    return weight[:, built.channels] if name == "down_proj" else weight[built.channels]


def _permuted(pair: Pair, order: torch.Tensor, is_down: bool) -> Pair:
    first, second = (factor.double() for factor in pair)
    return (first[:, order], second) if is_down else (first, second[order])


Stored = tuple[dict[str, torch.Tensor], ProjectionSpec, float, str]


def _store(matrix: Matrix, pairs: list[Pair], dtype: torch.dtype) -> Stored:
    """Tensors of one matrix in `dtype`, falling back from `compact` to `uv` at equal bytes where the pivots
    of a group are not good enough.
    """
    if matrix.spec.form == "uv":
        return _store_as(matrix, pairs, dtype, "")
    try:
        found = _store_as(matrix, [_pivoted(pair, matrix.is_down) for pair in pairs], dtype, "", pairs)
    except torch.linalg.LinAlgError:  # singular pivots: the matrix has a lower rank than it was given
        found = {}, matrix.spec, math.inf, ""
    if found[2] <= ROUNDING_LIMIT:
        return found
    n_in, n_out = pairs[0][0].shape[1], pairs[0][1].shape[0]
    # The most uv terms that take no more numbers; terms come in order of worth, so the first of them are the
    # best.
    rank = max(1, cost(matrix.rank, n_in, n_out, "compact") // (n_in + n_out))
    note = (
        f"pivots too weak (rounding {found[2]:.1%}), stored as uv of rank {rank} instead of compact of rank "
        f"{matrix.rank}"
    )
    lower = dataclasses.replace(matrix, spec=ProjectionSpec("uv", rank))
    return _store_as(lower, [(first[:rank], second[:, :rank]) for first, second in pairs], dtype, note)


def _store_as(
    matrix: Matrix, stored: list[Pair], dtype: torch.dtype, note: str, exact: list[Pair] | None = None
) -> Stored:
    """`stored` are the factors of the form; `exact` those that they stand for, where they are others."""
    cast = [(first.to(dtype), second.to(dtype)) for first, second in stored]
    change = max(
        _change(second @ first, _expanded(matrix, pair))
        for (first, second), pair in zip(exact or stored, cast, strict=True)
    )
    firsts, seconds = zip(*cast, strict=True)
    # Blocks stand one below another; only down's second factor, which joins the groups, has them side by
    # side.
    joined = torch.cat(firsts), torch.cat(seconds, 1 if matrix.is_down else 0)
    return tensors_of(matrix, *joined), matrix.spec, change, note


def _pivoted(pair: Pair, is_down: bool) -> Pair:
    return pivot_inputs(*pair) if is_down else pivot_outputs(*pair)


def _expanded(matrix: Matrix, pair: Pair) -> torch.Tensor:
    """The product of one group's stored factors, fp64."""
    first, second = (factor.double() for factor in pair)
    if matrix.spec.form == "uv":
        return second @ first
    eye = torch.eye(matrix.rank, dtype=torch.float64)
    return second @ torch.cat((eye, first), 1) if matrix.is_down else torch.cat((eye, second)) @ first


def _change(exact: torch.Tensor, stored: torch.Tensor) -> float:
    """Relative Frobenius distance; infinite where the stored matrix is not finite."""
    distance = float((exact - stored).norm() / exact.norm().clamp_min(1e-300))
    return distance if math.isfinite(distance) else math.inf


def matrix_errors(
    plan: Plan, analysis: Workspace, index: int, built: BuiltLayer, factored: FactoredLayer | None
) -> list[MatrixError]:
    """The three rows of one built layer; `factored` is None where it is the base's own."""
    rows, saved = [], analysis.load(layer_name(index)) if factored else {}
    for position, (name, matrix) in enumerate(built.layer.matrices.items()):
        spec = matrix.spec
        loss = float(factored.losses[position]) if factored else 0.0
        energy = float(factored.energies[position]) if factored else 1.0
        achieved: float | None = 0.0
        if factored and loss > 0.0:
            metric = factored.metrics[name]
            # A diagonal goes by channels, which have been ordered; down's metric by outputs, which have not.
            metric = metric[built.order] if metric.ndim == 1 else metric
            achieved = _achieved(plan, saved, index, name, built, metric)
        rows.append(
            MatrixError(
                index,
                name,
                spec.form,
                spec.rank,
                matrix.channels,
                matrix.parameters,
                loss,
                (loss / max(energy, 1e-300)) ** 0.5,
                achieved,
                built.rounding.get(name, 0.0),
            )
        )
    return rows


@torch.no_grad()
def _achieved(
    plan: Plan, saved: dict[str, torch.Tensor], index: int, name: str, built: BuiltLayer, metric: torch.Tensor
) -> float | None:
    """Down is compared over all channels that it saw; gate and up over those that are kept."""
    rows = saved.get("down.sample" if name == "down_proj" else "gate_up.sample")
    if rows is None:
        return None
    module = build_linear(built.layer.matrix(name))
    prefix = f"{name}."
    module.load_state_dict(
        {key.removeprefix(prefix): t.float() for key, t in built.tensors.items() if key.startswith(prefix)}
    )
    weight, channels = plan.base.tensor(f"model.layers.{index}.mlp.{name}.weight").float(), built.channels
    if name == "down_proj":
        exact, stored = rows @ weight.T, module(rows[:, channels])
    else:
        exact, stored = rows @ weight[channels].T, module(rows)
    # A matrix of zeros has no error.
    return metric_norm(exact - stored, metric) / max(metric_norm(exact, metric), 1e-300)
