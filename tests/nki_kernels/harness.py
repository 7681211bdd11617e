"""Packs a case, plans it, runs it in the simulator at hand and gives the reference beside the result."""

from __future__ import annotations

import numpy as np

from nki_kernels import reference
from nki_kernels.backend import simulate
from nki_kernels.cases import DTYPES, MLPCase, Weights, random_array, random_weights
from nki_kernels.kernels.svd_mlp import svd_mlp
from nki_kernels.layout import int8_layout, layout_of, mlp_layout
from nki_kernels.packing import factors_by_name, pack, pack_norm, pack_scales
from nki_kernels.planner import plan_launch
from nki_kernels.reference import SCALE
from nki_kernels.request import Request
from nki_kernels.tile_plan import Plan

EPS = 0.02  # large enough to be seen


def inputs(case: MLPCase, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x `[T, H]`, a norm weight `[H]` in fp32 and a residual `[T, H]`."""
    rng = np.random.default_rng(seed)
    x = random_array(rng, (case.tokens, case.hidden), DTYPES[case.dtype])
    weight = 1 + random_array(rng, (case.hidden,), np.dtype(np.float32), 0.2)
    return x, weight, random_array(rng, x.shape, x.dtype)


def plan_case(case: MLPCase, int8: bool = False) -> Plan:
    layout = mlp_layout(case.hidden, case.intermediate, *case.projections)
    eps = EPS if case.norm else None
    request = Request(
        int8_layout(layout) if int8 else layout, case.tokens, DTYPES[case.dtype], eps, case.residual
    )
    plan = plan_launch(request)
    assert isinstance(plan, Plan), plan
    return plan


def scales_by_name(weights: Weights) -> dict[str, np.ndarray]:
    """Matrix name -> scales, of int8 weights."""
    return factors_by_name(
        {
            name: {suffix: tensors[suffix + SCALE] for suffix in tensors if suffix + SCALE in tensors}
            for name, tensors in weights.items()
        }
    )


def without_scales(weights: Weights) -> Weights:
    return {
        name: {suffix: t for suffix, t in tensors.items() if not suffix.endswith(SCALE)}
        for name, tensors in weights.items()
    }


def run_svd_mlp(
    case: MLPCase, plan: Plan | None = None, weights: Weights | None = None, **options
) -> tuple[np.ndarray, np.ndarray]:
    """(kernel's y, reference's y); `options` go to our simulator. int8 weights bring their scales."""
    weights = random_weights(case) if weights is None else weights
    scales = scales_by_name(weights)
    plan = plan_case(case, bool(scales)) if plan is None else plan
    x, norm_weight, residual = inputs(case)
    layout = layout_of(plan.products, plan.external_z)
    arguments = {
        "norm_weight": pack_norm(norm_weight) if case.norm else None,
        "residual": residual if case.residual else None,
        "scales": pack_scales(layout, scales) if scales else None,
    }
    packed = pack(layout, factors_by_name(without_scales(weights)))
    found = simulate(svd_mlp, **options)(x, packed, plan, **arguments)
    norm = (norm_weight, EPS) if case.norm else None
    return found, reference.svd_mlp(x, weights, norm, residual if case.residual else None, case.groups)
