"""The pieces of a tensor-parallel gated MLP (scheme `gather`) that run between the collectives of one core.

    z = first_factors(x)          all-gather of z along its rows
    zd = second_factors(x, z)     reduce-scatter of zd along its rows
    y = last_factor(zd)           all-reduce of y

z is `[slots of gate + slots of up, T]`, so that both share one collective and every collective works on the
first dimension. Where down is dense, `second_factors` returns its part of y and `last_factor` is not called;
where gate and up are dense, `first_factors` is not.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import jit, nl
from nki_kernels.kernels.load import load_gathered, store_transposed
from nki_kernels.kernels.stages import (
    Workspace,
    down_first_product,
    finish,
    first_products,
    gated_product,
    load_input,
)
from nki_kernels.kernels.xuv import down
from nki_kernels.plan import Plan
from nki_kernels.tiling import pieces

Tensor = Any


@jit
def first_factors(x: Tensor, weights: Tensor, plan: Plan, norm_weight: Tensor = None) -> Tensor:
    """x `[T, H]` -> this core's z^T `[slots of gate + slots of up, T]`. Plan: of `first_stage(layout)`."""
    products: Any = plan.products
    gate_slots = products.gate_first.cols if plan.runs_gate_first else 0
    up_slots = products.up_first.cols if plan.runs_up_first else 0
    z = nl.ndarray((gate_slots + up_slots, plan.tokens), dtype=x.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, norm_weight)
    for first_token, tokens in pieces(plan.tokens, plan.block_tokens):
        work.stream.seek(0)
        load_input(work, work.x, x, first_token, tokens)
        first_products(work, tokens)
        if gate_slots > 0:
            store_transposed(z[0:gate_slots, :], work.gate_z, first_token, tokens)
        if up_slots > 0:
            store_transposed(z[gate_slots : gate_slots + up_slots, :], work.up_z, first_token, tokens)
    return z


@jit
def second_factors(
    x: Tensor, z: Tensor, slots: tuple, weights: Tensor, plan: Plan, norm_weight: Tensor = None
) -> Tensor:
    """Gathered z^T `[tp (slots of gate + slots of up), T]` -> this core's summand of down's z^T `[R, T]`; of
    y `[T, H]` if down is dense.

    `slots` = (slots of gate, slots of up) of one core, 0 for a dense projection. x `[T, H]` is what dense
    ones start from; pass None for x or z if no projection needs it. Plan: of `second_stage(layout)`.
    """
    products: Any = plan.products
    shape = (
        (products.down_first.cols, plan.tokens)
        if plan.runs_down_first
        else (plan.tokens, products.down_second.cols)
    )
    out = nl.ndarray(shape, dtype=weights.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, norm_weight)
    stride = slots[0] + slots[1]
    for first_token, tokens in pieces(plan.tokens, plan.block_tokens):
        work.stream.seek(0)
        if plan.x_tiles > 0:
            load_input(work, work.x, x, first_token, tokens)
        if plan.gate_z_tiles > 0:
            load_gathered(work.gate_z, z, (0, slots[0], stride), first_token, tokens)
        if plan.up_z_tiles > 0:
            load_gathered(work.up_z, z, (slots[0], slots[1], stride), first_token, tokens)
        gated_product(work, tokens)
        if plan.runs_down_first:
            down_first_product(work, tokens)
            store_transposed(out, work.down_z, first_token, tokens)
        else:
            finish(work, out, None, first_token, tokens)
    return out


# What follows the reduce-scatter is a product from a transposed activation, which there is already. Plan: of
# `last_stage(layout)`.
last_factor = down
