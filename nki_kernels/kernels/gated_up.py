"""silu(x Ug Vg) * (x Uu Vu): the first half of a gated MLP, its result transposed for `down` to consume
without a transpose.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nki, nl
from nki_kernels.kernels.load import store_transposed
from nki_kernels.kernels.stages import first_products, gated_product, load_input
from nki_kernels.kernels.workspace import Workspace
from nki_kernels.plan import Plan
from nki_kernels.tiling import pieces

Tensor = Any


@nki.jit
def gated_up(
    x: Tensor, weights: Tensor, plan: Plan, norm_weight: Tensor = None, scales: Tensor = None
) -> Tensor:
    """x `[T, H]` (or `[H, T]`) -> h^T `[I, T]`; gate and up of any forms and ranks, x loaded once. Layout:
    `gated_layout`.
    """
    h = nl.ndarray((plan.intermediate, plan.tokens), dtype=x.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, norm_weight, scales, x.dtype)
    blocks = pieces(plan.tokens, plan.block_tokens)
    for b in range(len(blocks)):
        first_token, tokens = blocks[b]
        work.open_block()
        load_input(work, work.x, x, first_token, tokens)
        first_products(work, tokens)
        gated_product(work, tokens)
        store_transposed(h, 0, work.h, plan.intermediate, blocks[b])
    return h
