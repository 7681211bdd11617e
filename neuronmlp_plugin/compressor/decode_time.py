"""What a rank costs in decode time: one token on one core of trn1 in bf16, by nki_kernels' cost model.
Simulated throughout.

A launch reads its weights in row tiles of 128, so time is a staircase in the rank where parameters are a
slope. One MLP is one launch, whose time is close to the dense one less what each projection saves by itself
(a test holds them to each other), so that a knapsack may price every matrix alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np

from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.lowrank.allocate import MIN_RANK_SHARE
from neuronmlp_plugin.models.factors import DENSE, PROJECTIONS, MLPShape, ProjectionSpec
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
            f"--faster: expected an MLP that the kernels take, found none for H {hidden}, I {intermediate}: {plan.reason}"
        )
    try:
        return price_plan(plan, BF16).simulated_us
    except RuntimeError as error:  # the vendor's nki is in force
        raise UsageError(f"--faster: {error}") from error


def model_us(shape: MLPShape, layers: Sequence[Mapping[str, ProjectionSpec]]) -> float:
    """Simulated us of all MLPs of a model for one token, each layer's launch priced as it is."""
    return sum(mlp_us(shape.hidden_size, shape.intermediate_size, _specs(layer)) for layer in layers)


def _specs(layer: Mapping[str, ProjectionSpec]) -> Specs:
    return layer["gate_proj"], layer["up_proj"], layer["down_proj"]


def priced_ranks(shape: MLPShape) -> list[int]:
    """The ranks whose launches are scheduled: first and last of every row tile; between them time is a
    straight line.
    """
    small, h, i = min(shape.hidden_size, shape.intermediate_size), shape.hidden_size, shape.intermediate_size
    least = max(1, int(MIN_RANK_SHARE * h * i / (h + i)))
    edges = {edge for tile in range(0, small, PMAX) for edge in (tile + 1, tile + PMAX)}
    return sorted({least, small - 1} | {edge for edge in edges if least < edge < small})


def rank_prices(
    shape: MLPShape, form: str, tick: Callable[[int], None] = lambda _: None
) -> dict[str, np.ndarray]:
    """Projection -> `[min(H, I) + 1]` simulated us of each rank, the last entry that of the dense matrix: a
    third of a dense MLP.

    Gate and up are alike to the kernel, so one is priced for both. Ranks below the least that allocation
    takes have no price of their own.
    """
    gate, down = (_prices(shape, name, form, tick) for name in ("gate_proj", "down_proj"))
    return {"gate_proj": gate, "up_proj": gate, "down_proj": down}


def _prices(shape: MLPShape, name: str, form: str, tick: Callable[[int], None]) -> np.ndarray:
    ranks, found = priced_ranks(shape), []
    dense = model_us(shape, [dict.fromkeys(PROJECTIONS, DENSE)])
    for rank in ranks:
        found.append(
            model_us(shape, [{**dict.fromkeys(PROJECTIONS, DENSE), name: ProjectionSpec(form, rank)}])
            - dense * 2 / 3
        )
        tick(1)
    small = min(shape.hidden_size, shape.intermediate_size)
    return np.append(np.interp(np.arange(small), ranks, found), dense / 3)
