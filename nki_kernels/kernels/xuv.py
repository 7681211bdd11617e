"""O = X U V, the product that the paper fuses: X U of a block of tokens stays on chip, transposed by
construction, for V to consume.

`down` is the same program: with `plan.transposed_input` it takes the h^T of `gated_up`, and nothing is
transposed.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import jit, nl
from nki_kernels.kernels.stages import Workspace, check_given, finish, load_input
from nki_kernels.plan import Plan
from nki_kernels.tiling import pieces

Tensor = Any


@jit
def xuv(x: Tensor, weights: Tensor, plan: Plan, residual: Tensor = None) -> Tensor:
    """x `[T, K]` (`[K, T]` if `plan.transposed_input`) -> `[T, N]`, or `[N, T]` for a layout with transposed
    output.

    The layout comes from `chain_layout`: `uv`, input-pivoted `compact`, or one `dense` matrix. SiLU behind if
    `plan.silu`; `residual` `[T, N]`, if `plan.with_residual`, is added to natural output in fp32.
    """
    check_given("residual", residual, plan.with_residual)
    products: Any = plan.products
    cols = products.down_second.cols
    shape = (plan.tokens, cols) if plan.natural_output else (cols, plan.tokens)
    out = nl.ndarray(shape, dtype=x.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, None)
    for first_token, tokens in pieces(plan.tokens, plan.block_tokens):
        work.stream.seek(0)
        load_input(work, work.h, x, first_token, tokens)
        finish(work, out, residual, first_token, tokens)
    return out


down = xuv
