"""The pieces of a tensor-parallel gated MLP (scheme `gather`) that run between the collectives of one core.

    z = first_factors(x)          all-gather of z along its rows
    zd = second_factors(x, z)     reduce-scatter of zd along its rows
    y = last_factor(zd)           all-reduce of y

z is `[slots of gate + slots of up, T]`, so that both share one collective and every collective works on the first dimension. Where down
is dense, `second_factors` returns its part of y and `last_factor` is not called; where gate and up are dense, `first_factors` is not.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import jit, nl
from nki_kernels.kernels.load import load_gathered, store_transposed
from nki_kernels.kernels.down import down
from nki_kernels.kernels.stages import Workspace, down_first_product, first_products, gated_product, natural_output
from nki_kernels.kernels.svd_mlp import load_x
from nki_kernels.plan import Plan
from nki_kernels.tiling import pieces

Tensor = Any


@jit
def first_factors(x: Tensor, weights: Tensor, plan: Plan, norm_weight: Tensor = None) -> Tensor:
    """x `[T, H]` -> this core's z^T `[slots of gate + slots of up, T]`. Plan: of `first_stage(layout)`."""
    gate, up = plan.layout.gate_first, plan.layout.up_first
    gate_slots = 0 if gate is None else gate.cols
    up_slots = 0 if up is None else up.cols
    z = nl.ndarray((gate_slots + up_slots, plan.tokens), dtype=x.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, norm_weight)
    for first_token, tokens in pieces(plan.tokens, plan.block_tokens):
        work.stream.seek(0)
        load_x(work, x, first_token, tokens)
        first_products(work, tokens)
        if gate_slots:
            store_transposed(z[0:gate_slots, :], work.z("gate"), first_token, tokens)
        if up_slots:
            store_transposed(z[gate_slots : gate_slots + up_slots, :], work.z("up"), first_token, tokens)
    return z


@jit
def second_factors(x: Tensor, z: Tensor, slots: tuple, weights: Tensor, plan: Plan, norm_weight: Tensor = None) -> Tensor:
    """Gathered z^T `[tp (slots of gate + slots of up), T]` -> this core's summand of down's z^T `[R, T]`, or of y `[T, H]` if down is dense.

    `slots` = (slots of gate, slots of up) of one core, 0 for a dense projection. x `[T, H]` is needed (and z is not) by dense ones; pass
    None for what no projection needs. Plan: of `second_stage(layout)`.
    """
    layout = plan.layout
    if layout.down_first is None:
        out_shape = (plan.tokens, layout.down_second.cols)
    else:
        out_shape = (layout.down_first.cols, plan.tokens)
    out = nl.ndarray(out_shape, dtype=weights.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, norm_weight)
    for first_token, tokens in pieces(plan.tokens, plan.block_tokens):
        work.stream.seek(0)
        if layout.hidden:
            load_x(work, x, first_token, tokens)
        if layout.has_z("gate"):
            load_gathered(work.z("gate"), z, 0, slots[0], slots[0] + slots[1], first_token, tokens)
        if layout.has_z("up"):
            load_gathered(work.z("up"), z, slots[0], slots[1], slots[0] + slots[1], first_token, tokens)
        gated_product(work, tokens)
        if layout.down_first is None:
            natural_output(work, work.h(), out, None, first_token, tokens)
        else:
            down_first_product(work, tokens)
            store_transposed(out, work.z("down"), first_token, tokens)
    return out


# What follows the reduce-scatter is a down projection from a transposed activation, which there is already. Plan: of `last_stage(layout)`.
last_factor = down
