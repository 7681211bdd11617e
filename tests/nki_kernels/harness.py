"""Packs a case, plans it, runs it in the simulator at hand and gives the reference beside the result."""

from __future__ import annotations

import numpy as np

from nki_kernels import reference
from nki_kernels.backend import simulate
from nki_kernels.cases import DTYPES, MLPCase, Weights, random_array, random_weights
from nki_kernels.kernels.svd_mlp import svd_mlp
from nki_kernels.layout import layout_of
from nki_kernels.packing import factors_by_name, pack, pack_norm
from nki_kernels.plan import Plan
from nki_kernels.planner import plan_mlp

EPS = 0.02  # large enough to be seen


def inputs(case: MLPCase, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x `[T, H]`, a norm weight `[H]` in fp32 and a residual `[T, H]`."""
    rng = np.random.default_rng(seed)
    x = random_array(rng, (case.tokens, case.hidden), DTYPES[case.dtype])
    weight = 1 + random_array(rng, (case.hidden,), np.dtype(np.float32), 0.2)
    return x, weight, random_array(rng, x.shape, x.dtype)


def plan_case(case: MLPCase) -> Plan:
    plan = plan_mlp(
        case.hidden,
        case.intermediate,
        case.projections,
        case.tokens,
        DTYPES[case.dtype],
        EPS if case.norm else None,
        case.residual,
    )
    assert isinstance(plan, Plan), plan
    return plan


def run_svd_mlp(
    case: MLPCase, plan: Plan | None = None, weights: Weights | None = None, **options
) -> tuple[np.ndarray, np.ndarray]:
    """(kernel's y, reference's y); `options` go to our simulator."""
    weights = random_weights(case) if weights is None else weights
    plan = plan_case(case) if plan is None else plan
    x, norm_weight, residual = inputs(case)
    packed = pack(layout_of(plan.products, plan.external_z), factors_by_name(weights))
    arguments = {
        "norm_weight": pack_norm(norm_weight) if case.norm else None,
        "residual": residual if case.residual else None,
    }
    found = simulate(svd_mlp, **options)(x, packed, plan, **arguments)
    norm = (norm_weight, EPS) if case.norm else None
    return found, reference.svd_mlp(x, weights, norm, residual if case.residual else None, case.groups)
