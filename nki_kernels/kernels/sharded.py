"""The pieces of a tensor-parallel gated MLP (scheme `gather`) that run between the collectives of one core.

    z = first_factors(x)          all-gather of z along its first dimension
    zd = second_factors(x, z)     reduce-scatter of zd along its first dimension
    y = last_factor(zd)           all-reduce of y

z holds gate's and up's side by side, so that both share one collective. It travels as `[channels, T]` or,
where such rows would be short (`request.z_is_natural`), as `[T, channels]`, core after core either way. Where
down is dense, `second_factors` returns its part of y and `last_factor` is not called; where gate and up are
dense, `first_factors` is not.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nki, nl
from nki_kernels.kernels.load import load_gathered, load_gathered_natural, store_natural, store_transposed
from nki_kernels.kernels.stages import (
    down_first_product,
    finish,
    first_products,
    gated_product,
    load_input,
)
from nki_kernels.kernels.svd_mlp import down
from nki_kernels.kernels.workspace import Workspace
from nki_kernels.tile_plan import Plan
from nki_kernels.tiling import pieces

Tensor = Any


@nki.jit
def first_factors(
    x: Tensor, weights: Tensor, plan: Plan, norm_weight: Tensor = None, scales: Tensor = None
) -> Tensor:
    """x `[T, H]` -> this core's z `[slots of gate + slots of up, T]` (`[T, slots]` if `plan.natural_z`).
    Plan: of `first_stage(layout)`.
    """
    gate_slots = plan.products.gate_first.cols if plan.runs_gate_first else 0
    up_slots = plan.products.up_first.cols if plan.runs_up_first else 0
    slots = gate_slots + up_slots
    # Gate's slots, then up's: one tensor, so that one collective takes both.
    shape = (plan.tokens, slots) if plan.natural_z else (slots, plan.tokens)
    z = nl.ndarray(shape, dtype=x.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, norm_weight, scales, x.dtype)
    blocks = pieces(plan.tokens, plan.block_tokens)
    for b in range(len(blocks)):
        first_token, tokens = blocks[b]
        work.open_block()
        load_input(work, work.x, x, first_token, tokens)
        first_products(work, tokens)
        if gate_slots > 0:
            store_z(work, z, work.gate_z, (0, gate_slots), blocks[b])
        if up_slots > 0:
            store_z(work, z, work.up_z, (gate_slots, up_slots), blocks[b])
    return z


def store_z(work: Workspace, z: Tensor, source: Tensor, channels: tuple, where: tuple) -> None:
    """Channels (first, count) of z in HBM from `source` `[128, row tiles, tokens]`; where = (first token,
    tokens).
    """
    first, count = channels
    if work.plan.natural_z:
        store_natural(work, z, source, (0, count), first, where)
    else:
        store_transposed(z, first, source, count, where)


@nki.jit
def second_factors(
    x: Tensor,
    z: Tensor,
    slots: tuple,
    weights: Tensor,
    plan: Plan,
    norm_weight: Tensor = None,
    scales: Tensor = None,
) -> Tensor:
    """Gathered z `[tp (slots of gate + slots of up), T]` -> this core's summand of down's z `[tp slots of
    down, T]` (`[tp T, slots]` both, if `plan.natural_z`); of y `[T, H]` if down is dense.

    `slots` = (slots of gate, of up, of down) of one core, 0 for a dense projection. x `[T, H]` is what dense
    ones start from; pass None for x or z if no projection needs it. Plan: of `second_stage(layout)`.
    """
    dtype = z.dtype if x == None else x.dtype  # noqa: E711
    # A core's summand of all of down's z: the reduce-scatter that follows leaves each core its own slots.
    out = nl.ndarray(second_shape(plan, slots), dtype=dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, norm_weight, scales, dtype)
    stride = slots[0] + slots[1]
    blocks = pieces(plan.tokens, plan.block_tokens)
    for b in range(len(blocks)):
        first_token, tokens = blocks[b]
        work.open_block()
        if plan.x_tiles > 0:
            load_input(work, work.x, x, first_token, tokens)
        if plan.gate_z_tiles > 0:
            load_z(work, work.gate_z, z, (0, slots[0], stride), blocks[b])
        if plan.up_z_tiles > 0:
            load_z(work, work.up_z, z, (slots[0], slots[1], stride), blocks[b])
        gated_product(work, tokens)
        if plan.runs_down_first:
            down_first_product(work, tokens)
            store_down_z(work, out, slots[2], blocks[b])
        else:
            finish(work, out, None, first_token, tokens)
    return out


def second_shape(plan: Plan, slots: tuple) -> tuple:
    """Shape of what `second_factors` returns."""
    if not plan.runs_down_first:
        return (plan.tokens, plan.products.down_second.cols)
    rank = plan.products.down_first.cols
    return (rank // slots[2] * plan.tokens, slots[2]) if plan.natural_z else (rank, plan.tokens)


def load_z(work: Workspace, dst: Tensor, z: Tensor, share: tuple, where: tuple) -> None:
    """One projection's whole z, transposed on chip; share = (first channel, channels, all channels) of one
    core.
    """
    if work.plan.natural_z:
        load_gathered_natural(work, dst, z, share, where)
    else:
        load_gathered(dst, z, share, where)
    work.scales.load(work)


def store_down_z(work: Workspace, out: Tensor, slots: int, where: tuple) -> None:
    """z of down to HBM, the share of core after core."""
    rank = work.plan.products.down_first.cols
    if not work.plan.natural_z:
        store_transposed(out, 0, work.down_z, rank, where)
        return
    for core in range(rank // slots):
        first_token, tokens = where
        there = (core * work.plan.tokens + first_token, tokens)
        store_natural(work, out, work.down_z, (core * slots, slots), 0, there)


# What follows the reduce-scatter is a product from an activation that needs no transpose, or a short one.
# Plan: of `last_stage(layout)`.
last_factor = down
