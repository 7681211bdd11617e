"""The whole gated MLP in one launch: y = down(silu(gate(x)) * up(x)), RMSNorm in front and residual behind if
wanted.

x^T, the z of all three projections and the activation h^T of a block of tokens stay on chip; x and y cross
HBM once and the weights once per block of tokens. Prefill and decode are the same program: with few tokens it
streams weights and waits for DMA, with many it computes.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nki, nl
from nki_kernels.kernels.stages import finish, first_products, gated_product, load_input
from nki_kernels.kernels.workspace import Workspace, check_given
from nki_kernels.plan import Plan
from nki_kernels.tiling import pieces

Tensor = Any


@nki.jit
def svd_mlp(
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    norm_weight: Tensor = None,
    residual: Tensor = None,
    scales: Tensor = None,
) -> Tensor:
    """x `[T, H]` (`[H, T]` if `plan.transposed_input`) -> y `[T, H]`, in the element type of the weights.

    `weights`: `[128, C]` from `packing.pack(plan.layout, ...)`. `norm_weight`, if `plan.with_norm`: `[128,
    ceil(H / 128)]` fp32 from `packing.pack_norm`. `residual` `[T, H]`, if `plan.with_residual`, is added to y
    in fp32 before y is rounded; for a Llama layer it is x.
    """
    check_given("residual", residual, plan.with_residual)
    products = plan.products
    y = nl.ndarray((plan.tokens, products.down_second.cols), dtype=x.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, norm_weight, scales, x.dtype)
    blocks = pieces(plan.tokens, plan.block_tokens)
    for b in range(len(blocks)):
        first_token, tokens = blocks[b]
        work.open_block()
        load_input(work, work.x, x, first_token, tokens)
        first_products(work, tokens)
        gated_product(work, tokens)
        finish(work, y, residual, first_token, tokens)
    return y
