"""What to price: kernels with placeholders of the right shapes, and whole launches of a plan by its repeating
token block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from nki_kernels.cost.constants import CALIBRATED, Constants
from nki_kernels.cost.estimate import Estimate, extrapolate, price
from nki_kernels.kernels.sharded import first_factors, second_factors
from nki_kernels.kernels.svd_mlp import gated_up, svd_mlp, xuv
from nki_kernels.layout import Layout, layout_of
from nki_kernels.planner import plan_launch
from nki_kernels.request import Request
from nki_kernels.simulator import Placeholder
from nki_kernels.targets import PMAX, TRN1, Target
from nki_kernels.tile_plan import Plan
from nki_kernels.tiling import tile_count

Launch = tuple[Callable[..., Any], tuple[Any, ...]]


def launch_of(plan: Plan, dtype: np.dtype, tp: int = 1) -> Launch:
    """The kernel that runs `plan` on one of `tp` cores, and its arguments as placeholders."""
    layout = layout_of(plan.products, plan.external_z)
    features = layout.hidden or layout.intermediate
    shape = (features, plan.tokens) if plan.transposed_input else (plan.tokens, features)
    x = Placeholder(shape, dtype)
    weights = Placeholder((PMAX, layout.packed_cols), np.dtype(np.int8) if plan.is_int8 else dtype)
    scales = Placeholder((PMAX, plan.scale_cols), np.dtype(np.float32)) if plan.is_int8 else None
    norm = Placeholder((PMAX, tile_count(layout.hidden)), np.dtype(np.float32)) if plan.with_norm else None
    last = layout.down_second
    residual = (
        Placeholder((plan.tokens, last.cols), dtype) if plan.with_residual and last is not None else None
    )
    # What a layout has names its kernel: a z from outside, second_factors; gate and up, svd_mlp or gated_up;
    # neither, one projection or the first stage.
    if layout.external_z:
        gate, up = (z_rows(layout, name) // tp for name in ("gate", "up"))
        down = layout.down_first.cols // tp if layout.down_first is not None else 0
        rows, cols = tp * (gate + up), plan.tokens
        z = Placeholder((tp * cols, gate + up) if plan.natural_z else (rows, cols), dtype)
        return second_factors, (x if plan.x_tiles else None, z, (gate, up, down), weights, plan, norm, scales)
    if layout.gate_second is not None:
        return (
            (gated_up, (x, weights, plan, norm, scales))
            if last is None
            else (svd_mlp, (x, weights, plan, norm, residual, scales))
        )
    return (
        (first_factors, (x, weights, plan, norm, scales))
        if last is None
        else (xuv, (x, weights, plan, residual, scales))
    )


def z_rows(layout: Layout, projection: str) -> int:
    """Length of the z of "gate" or "up" that the launch is given, 0 where it is given none."""
    matrix = layout.matrix(f"{projection}_second")
    return matrix.rows if matrix is not None and projection in layout.external_z else 0


class PlanRuns:
    """A launch by its token blocks: a few are scheduled, the others are like the last of them; a ragged rest
    is scheduled with them.
    """

    def __init__(
        self,
        plan: Plan,
        dtype: np.dtype,
        target: Target = TRN1,
        constants: Constants = CALIBRATED,
        tp: int = 1,
    ) -> None:
        self.plan, self.dtype, self.target, self.constants, self.tp = plan, dtype, target, constants, tp
        self.blocks, self.rest = divmod(plan.tokens, plan.block_tokens)
        self._run = functools.cache(self._schedule)

    def _schedule(self, count: int) -> Estimate:
        part = dataclasses.replace(self.plan, tokens=count * self.plan.block_tokens + self.rest)
        return price(*launch_of(part, self.dtype, self.tp), self.target, self.constants)

    def rough_us(self) -> float:
        """From two blocks, and no less than what the busiest resource works: good enough to rank plans."""
        guess = extrapolate(self._run, self.blocks, 2)
        return max(guess.simulated_us, guess.busiest_us)

    def estimate(self) -> Estimate:
        """From three blocks or, where three have not settled (less time than the busiest resource works),
        from as many as it takes.
        """
        for sample in range(3, max(3, self.blocks) + 1):
            found = extrapolate(self._run, self.blocks, sample)
            if found.simulated_us >= found.busiest_us:
                break
        return found


def price_plan(
    plan: Plan, dtype: np.dtype, target: Target = TRN1, constants: Constants = CALIBRATED, tp: int = 1
) -> Estimate:
    """The estimate of a whole launch on one of `tp` cores."""
    return PlanRuns(plan, dtype, target, constants, tp).estimate()


@dataclasses.dataclass(frozen=True)
class Priced:
    """A launch under the planner's plan, as serving runs it."""

    plan: Plan
    estimate: Estimate


@functools.lru_cache(maxsize=4096)
def price_launch(
    request: Request, target: Target = TRN1, constants: Constants = CALIBRATED, tp: int = 1
) -> Priced:
    """One launch on one of `tp` cores. Raises ValueError where there is no plan."""
    plan = plan_launch(request, target)
    if not isinstance(plan, Plan):
        raise ValueError(plan.reason)
    return Priced(plan, price_plan(plan, request.dtype, target, constants, tp))
