"""O = X U V, the product that the paper fuses: X U of a block of tokens stays on chip, transposed by
construction, for V to consume.

`down` is the same program: with `plan.transposed_input` it takes the h^T of `gated_up`, and nothing is
transposed.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nki, nl
from nki_kernels.kernels.arrival import product_on_arrival
from nki_kernels.kernels.stages import finish, last_product, load_input
from nki_kernels.kernels.workspace import Workspace, check_given
from nki_kernels.plan import Plan
from nki_kernels.tiling import pieces

Tensor = Any


@nki.jit
def xuv(x: Tensor, weights: Tensor, plan: Plan, residual: Tensor = None, scales: Tensor = None) -> Tensor:
    """x `[T, K]` (`[K, T]` if `plan.transposed_input`) -> `[T, N]`, or `[N, T]` for a layout with transposed
    output.

    The layout comes from `chain_layout`: `uv`, input-pivoted `compact`, or one `dense` matrix. SiLU behind if
    `plan.silu`; `residual` `[T, N]`, if `plan.with_residual`, is added to natural output in fp32.
    """
    check_given("residual", residual, plan.with_residual)
    products = plan.products
    cols = products.down_second.cols
    shape = (plan.tokens, cols) if plan.natural_output else (cols, plan.tokens)
    out = nl.ndarray(shape, dtype=x.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, None, scales, x.dtype)
    blocks = pieces(plan.tokens, plan.block_tokens)
    for b in range(len(blocks)):
        first_token, tokens = blocks[b]
        work.open_block()
        if b == 0 and plan.early_tiles > 0:
            product_on_arrival(work, x, tokens)
            last_product(work, out, residual, first_token, tokens)
        else:
            load_input(work, work.h, x, first_token, tokens)
            finish(work, out, residual, first_token, tokens)
    return out


down = xuv
