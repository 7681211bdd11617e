"""The down projection from the transposed activation of `gated_up`: nothing is transposed."""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import jit, nl
from nki_kernels.kernels.load import load_transposed
from nki_kernels.kernels.stages import Workspace
from nki_kernels.kernels.svd_mlp import finish
from nki_kernels.plan import Plan
from nki_kernels.tiling import pieces

Tensor = Any


@jit
def down(h: Tensor, weights: Tensor, plan: Plan, residual: Tensor = None) -> Tensor:
    """h^T `[I, T]` -> y `[T, H]`, plus `residual` `[T, H]`; any form."""
    y = nl.ndarray((plan.tokens, plan.layout.down_second.cols), dtype=h.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, None)
    for first_token, tokens in pieces(plan.tokens, plan.block_tokens):
        work.stream.seek(0)
        load_transposed(work.h(), h, first_token, tokens)
        finish(work, y, residual, first_token, tokens)
    return y
