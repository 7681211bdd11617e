"""O = X U V, the product that the paper fuses: X U of a block of tokens stays on chip, transposed by construction, for V to consume."""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import jit, nl
from nki_kernels.kernels.load import load_natural, load_transposed
from nki_kernels.kernels.stages import Workspace, down_first_product, natural_output, transposed_output
from nki_kernels.plan import Plan
from nki_kernels.tiling import MOVING_COLS, pieces

Tensor = Any


@jit
def xuv(x: Tensor, weights: Tensor, plan: Plan, residual: Tensor = None) -> Tensor:
    """x `[T, K]` (`[K, T]` if `plan.transposed_input`) -> `[T, N]`, or `[N, T]` if the plan's last matrix is stationary.

    The layout comes from `chain_layout`: `uv`, input-pivoted `compact`, or one `dense` matrix. SiLU behind if `plan.silu`; `residual`
    `[T, N]` is added to natural output in fp32 (without SiLU).
    """
    layout = plan.layout
    natural = layout.down_second.tile_cols == MOVING_COLS
    shape = (plan.tokens, layout.down_second.cols) if natural else (layout.down_second.cols, plan.tokens)
    out = nl.ndarray(shape, dtype=x.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, None)
    for first_token, tokens in pieces(plan.tokens, plan.block_tokens):
        work.stream.seek(0)
        if plan.transposed_input:
            load_transposed(work.h(), x, first_token, tokens)
        else:
            load_natural(work.h(), x, first_token, tokens, work.input_rows(x.shape[1]), None)
        source = work.h()
        if layout.down_first is not None:
            down_first_product(work, tokens)
            source = work.z("down")
        if natural:
            natural_output(work, source, out, residual, first_token, tokens)
        else:
            transposed_output(work, source, out, first_token, tokens)
    return out
