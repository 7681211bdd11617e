"""What to price: kernels with placeholders of the right shapes, and whole launches of a plan by its repeating token block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from nki_kernels.cost.constants import CALIBRATED, Constants
from nki_kernels.cost.estimate import Estimate, extrapolate, price
from nki_kernels.kernels.gated_up import gated_up
from nki_kernels.kernels.svd_mlp import svd_mlp
from nki_kernels.kernels.xuv import xuv
from nki_kernels.plan import Plan
from nki_kernels.simulator import Placeholder
from nki_kernels.targets import PMAX, TRN1, Target
from nki_kernels.tiling import tile_count

Launch = tuple[Callable[..., Any], tuple[Any, ...]]


def launch_of(plan: Plan, dtype: np.dtype) -> Launch:
    """The kernel that runs `plan`, and its arguments as placeholders."""
    layout = plan.layout
    features = layout.hidden or layout.intermediate
    shape = (features, plan.tokens) if plan.transposed_input else (plan.tokens, features)
    x, weights = Placeholder(shape, dtype), Placeholder((PMAX, layout.packed_cols), dtype)
    last = layout.down_second
    residual = Placeholder((plan.tokens, last.cols), dtype) if plan.with_residual and last is not None else None
    if layout.gate_second is None:
        return xuv, (x, weights, plan, residual)
    norm = Placeholder((PMAX, tile_count(layout.hidden)), np.dtype(np.float32)) if plan.with_norm else None
    return (gated_up, (x, weights, plan, norm)) if last is None else (svd_mlp, (x, weights, plan, norm, residual))


def price_plan(plan: Plan, dtype: np.dtype, target: Target = TRN1, constants: Constants = CALIBRATED, sample: int = 3) -> Estimate:
    """A whole launch: `sample` token blocks are scheduled, the others are like the last of them; a ragged rest is scheduled too."""
    blocks, rest = divmod(plan.tokens, plan.block_tokens)

    def run(count: int) -> Estimate:
        part = dataclasses.replace(plan, tokens=count * plan.block_tokens + rest)
        return price(*launch_of(part, dtype), target, constants)

    return extrapolate(run, blocks, sample)
