"""What a rank costs in decode time: one token, a core of trn1 for every group, in bf16, by nki_kernels' cost
model. Simulated throughout.

A launch reads its weights in row tiles of 128 and halves of them, so time is a staircase in the rank where
parameters are a slope. One MLP is one launch, whose time is close to the dense one less what each projection
saves by itself (a test holds them to each other), so that a knapsack may price every matrix alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from neuronmlp_plugin.compressor.plan import Plan
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.lowrank.allocate import MIN_RANK_SHARE
from neuronmlp_plugin.models.factors import DENSE, PROJECTIONS, MLPLayer, ProjectionSpec
from nki_kernels.cost.launches import price_plan
from nki_kernels.layout import Projection
from nki_kernels.planner import Declined, plan_mlp
from nki_kernels.targets import PMAX

TOKENS = 1
BF16 = np.dtype(ml_dtypes.bfloat16)
Specs = tuple[ProjectionSpec, ProjectionSpec, ProjectionSpec]  # of gate, up and down


@functools.cache
def mlp_us(hidden: int, intermediate: int, specs: Specs) -> float:
    """Simulated us of one MLP with the plan that serving would take. Raises UsageError where there is none,
    or no simulator.
    """
    gate, up, down = (Projection.whole(spec.form, spec.rank) for spec in specs)
    plan = plan_mlp(hidden, intermediate, (gate, up, down), TOKENS, BF16)
    if isinstance(plan, Declined):
        raise UsageError(
            f"--faster: expected an MLP that the kernels take, found none for H {hidden}, I {intermediate}: "
            f"{plan.reason}"
        )
    try:
        return price_plan(plan, BF16).simulated_us
    except RuntimeError as error:  # the vendor's nki is in force
        raise UsageError(f"--faster: {error}") from error


def model_us(layers: Iterable[MLPLayer]) -> float:
    """Simulated us of all MLPs of a model for one token, each layer's launch priced as it is: on one of as
    many cores as there are groups.
    """
    return sum(_layer_us(layer.hidden_size, layer.channels // layer.groups, layer) for layer in layers)


def _layer_us(hidden: int, channels: int, specs: Mapping[str, ProjectionSpec]) -> float:
    return mlp_us(hidden, channels, (specs["gate_proj"], specs["up_proj"], specs["down_proj"]))


def dense_us(plan: Plan) -> float:
    """Of the dense model's MLPs on as many cores."""
    shape, all_dense = plan.shape, dict.fromkeys(PROJECTIONS, DENSE)
    return shape.num_layers * _layer_us(shape.hidden_size, shape.intermediate_size // plan.groups, all_dense)


def priced_ranks(hidden: int, channels: int) -> list[int]:
    """The ranks whose launches are scheduled: first and last of every half of a row tile; between them time
    is a straight line. Up to a half, two column tiles share a block for a ragged row tile.
    """
    small, half = min(hidden, channels), PMAX // 2
    least = max(1, int(MIN_RANK_SHARE * hidden * channels / (hidden + channels)))
    edges = {edge for tile in range(0, small, half) for edge in (tile + 1, tile + half)}
    return sorted({least, small - 1} | {edge for edge in edges if least < edge < small})


def priced_launches(plan: Plan) -> int:
    """How many `level_prices` schedules, beside the dense ones."""
    h = plan.shape.hidden_size
    return sum(2 * len(priced_ranks(h, k // plan.groups)) for k in plan.factored_levels)


def level_prices(
    plan: Plan, tick: Callable[[int], None] = lambda _: None
) -> dict[int, dict[str, np.ndarray]]:
    """Channels of a level -> projection -> simulated us of each rank on a group's core, the last entry that
    of the dense matrix.
    """
    h, found = plan.shape.hidden_size, {}
    for channels in plan.levels:
        part = channels // plan.groups
        if channels in plan.factored_levels:
            found[channels] = rank_prices(h, part, plan.settings.form, tick)
        else:
            # No rank is offered at such a level (`plan.factored_levels`), so of these prices only the last,
            # dense, counts.
            third = _layer_us(h, part, dict.fromkeys(PROJECTIONS, DENSE)) / 3
            found[channels] = dict.fromkeys(PROJECTIONS, np.full(min(h, part) + 1, third))
    return found


def rank_prices(
    hidden: int, channels: int, form: str, tick: Callable[[int], None] = lambda _: None
) -> dict[str, np.ndarray]:
    """Projection -> `[min(H, channels) + 1]` simulated us of each rank, the last entry that of the dense
    matrix: a third of a dense MLP.

    Gate and up are alike to the kernel, so one is priced for both. Ranks below the least that allocation
    takes have no price of their own.
    """
    gate, down = (_prices(hidden, channels, name, form, tick) for name in ("gate_proj", "down_proj"))
    return {"gate_proj": gate, "up_proj": gate, "down_proj": down}


def _prices(hidden: int, channels: int, name: str, form: str, tick: Callable[[int], None]) -> np.ndarray:
    ranks, found = priced_ranks(hidden, channels), []
    all_dense = dict.fromkeys(PROJECTIONS, DENSE)
    dense = _layer_us(hidden, channels, all_dense)
    for rank in ranks:
        made = {**all_dense, name: ProjectionSpec(form, rank)}
        # The launch without the other two matrices, which stay dense at a third of the dense time each.
        found.append(_layer_us(hidden, channels, made) - dense * 2 / 3)
        tick(1)
    return np.append(np.interp(np.arange(min(hidden, channels)), ranks, found), dense / 3)
