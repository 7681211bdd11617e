"""The stages of a gated MLP over one block of tokens. Every kernel of this package is a choice of them."""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nl
from nki_kernels.kernels.load import Norm, load_natural, load_transposed
from nki_kernels.kernels.products import column_tile, natural_tile, transposed_product, transposed_tile
from nki_kernels.kernels.stream import WeightStream
from nki_kernels.plan import Plan
from nki_kernels.targets import PMAX
from nki_kernels.tiling import pieces, tile_count

Tensor = Any


class Workspace(nl.NKIObject):
    """Everything that a launch holds in SBUF, allocated once and exactly as the plan says, and the views of
    it by what they hold.

    x, h and z are `[128, row tiles, block_tokens]`. Views that the launch does not use are None.
    """

    def __init__(self, plan: Plan, weights: Tensor, norm_weight: Tensor) -> None:
        check_given("norm_weight", norm_weight, plan.with_norm)
        self.plan = plan
        self.wide = nl.ndarray((PMAX, plan.wide_cols), dtype=weights.dtype, buffer=nl.sbuf, name="wide")
        self.narrow = nl.ndarray((PMAX, plan.narrow_cols), dtype=weights.dtype, buffer=nl.sbuf, name="narrow")
        self.stream = WeightStream(weights, plan.chunk_bounds, plan.ring_slots, plan.ring_cols)
        self.identity = None
        if plan.identity_at >= 0:
            self.identity = nl.ndarray((PMAX, PMAX), dtype=weights.dtype, buffer=nl.sbuf, name="identity")
            nisa.dma_copy(dst=self.identity, src=weights[:, plan.identity_at : plan.identity_at + PMAX])
        self.activated = []
        if plan.runs_gated:
            for i in range(2):
                self.activated.append(
                    nl.ndarray(
                        (PMAX, plan.moving_tokens), dtype=nl.float32, buffer=nl.sbuf, name=f"activated{i}"
                    )
                )
        self.norms = []
        if plan.with_norm:
            self.norms.append(Norm(norm_weight, plan.norm_eps))
        self.place_views()

    def place_views(self) -> None:
        """Name the regions of the arenas."""
        plan = self.plan
        self.x = self.tiles(self.wide, 0, plan.x_tiles)
        self.h = self.tiles(self.wide, plan.h_offset, plan.h_tiles)
        self.gate_z = self.tiles(self.narrow, 0, plan.gate_z_tiles)
        self.up_z = self.tiles(self.narrow, plan.gate_z_tiles * plan.block_tokens, plan.up_z_tiles)
        self.down_z = self.tiles(self.narrow, 0, plan.down_z_tiles)

    def tiles(self, arena: Tensor, offset: int, count: int) -> Tensor:
        """`[128, count, block_tokens]` out of an arena, or None for a count of 0."""
        tokens = self.plan.block_tokens
        if count == 0:
            return None
        return arena[:, offset : offset + count * tokens].reshape((PMAX, count, tokens))

    def input_rows(self, features: int) -> Tensor:
        """`[128, 2 or 3, features]`: room for natural input on its way through the transpose."""
        count = 3 if self.plan.with_norm else 2
        at = self.plan.input_offset
        return self.wide[:, at : at + count * features].reshape((PMAX, count, features))

    def output_rows(self, token_tiles: int) -> Tensor:
        """`[128, token tiles, out_cols]`: natural results on their way out."""
        at, cols = self.plan.output_offset, self.plan.out_cols
        return self.wide[:, at : at + token_tiles * cols].reshape((PMAX, token_tiles, cols))

    def output_turn(self, n: int) -> Tensor:
        """`[128, block_tokens]`: one of two turns of a transposed column tile on its way out."""
        tokens = self.plan.block_tokens
        at = self.plan.output_offset + n % 2 * tokens
        return self.wide[:, at : at + tokens]


def check_given(name: str, operand: Tensor, wanted: bool) -> None:
    """Refuse an operand that the plan does not use, and a plan whose operand is missing."""
    # Compilers before NKI 0.7 know no `is`.
    given = operand != None  # noqa: E711
    assert given == wanted, (
        f"{name}: expected {wanted} by the plan, found {given}; plan and operands must agree"
    )


def load_input(work: Workspace, dst: Tensor, src: Tensor, first_token: int, tokens: int) -> None:
    """A block of `src` as activation^T on chip; from `[T, features]`, normalised if the plan says so, or from
    `[features, T]`.
    """
    if work.plan.transposed_input:
        load_transposed(dst, src, first_token, tokens)
    else:
        load_natural(dst, src, first_token, tokens, work.input_rows(src.shape[1]), work.norms)


def first_products(work: Workspace, tokens: int) -> None:
    """z of gate and of up, from x."""
    products: Any = work.plan.products
    widths = pieces(tokens, work.plan.moving_tokens)
    if work.plan.runs_gate_first:
        transposed_product(work.stream, products.gate_first, work.x, work.gate_z, widths, work.identity)
    if work.plan.runs_up_first:
        transposed_product(work.stream, products.up_first, work.x, work.up_z, widths, work.identity)


def gated_product(work: Workspace, tokens: int) -> None:
    """h = silu(gate) * up, tile by tile of the intermediate channels; gate and up leave PSUM only as h."""
    products: Any = work.plan.products
    widths = pieces(tokens, work.plan.moving_tokens)
    gate_source = work.gate_z if work.plan.gate_z_tiles > 0 else work.x
    up_source = work.up_z if work.plan.up_z_tiles > 0 else work.x
    for n in range(products.gate_second.col_tiles()):
        cols = products.gate_second.tile_width(n)
        gate = column_tile(work.stream, products.gate_second, n, gate_source, widths, work.identity)
        up = column_tile(work.stream, products.up_second, n, up_source, widths, work.identity)
        for j in range(len(widths)):
            start, width = widths[j]
            activated = work.activated[(n * len(widths) + j) % 2][0:cols, 0:width]
            nisa.activation(dst=activated, op=nl.silu, data=gate[j])
            nisa.tensor_tensor(
                dst=work.h[0:cols, n, start : start + width], data1=activated, data2=up[j], op=nl.multiply
            )


def down_first_product(work: Workspace, tokens: int) -> None:
    """z of down, from h; the pivots of a compact projection are added to the sum in PSUM, as identity blocks."""
    widths = pieces(tokens, work.plan.moving_tokens)
    products: Any = work.plan.products
    transposed_product(work.stream, products.down_first, work.h, work.down_z, widths, work.identity)


def natural_output(
    work: Workspace, source: Tensor, out: Tensor, residual: Tensor, first_token: int, tokens: int
) -> None:
    """out `[T, columns]` = source W (+ residual), staged in rows of `out_cols` columns so that stores are
    long.
    """
    matrix: Any = work.plan.products.down_second
    tiles = pieces(tokens, PMAX)
    stage = work.output_rows(len(tiles))
    for first_col, cols in pieces(matrix.cols, work.plan.out_cols):
        if work.plan.with_residual:
            copy_rows(stage, residual, first_token, tiles, first_col, cols, False)
        for n in range(first_col // matrix.tile_cols, tile_count(first_col + cols, matrix.tile_cols)):
            natural_column(work, source, stage, n, n * matrix.tile_cols - first_col, tiles)
        copy_rows(stage, out, first_token, tiles, first_col, cols, True)


def natural_column(work: Workspace, source: Tensor, stage: Tensor, n: int, at: int, tiles: list) -> None:
    """Column tile `n` of the output into stage[:, :, at:], a group of token tiles at a time."""
    matrix: Any = work.plan.products.down_second
    cols = matrix.tile_width(n)
    mark = work.stream.position
    group = work.plan.token_group
    for first, count in pieces(len(tiles), group):
        work.stream.seek(mark)
        sums = natural_tile(work.stream, matrix, n, source, tiles[first : first + count])
        for j in range(count):
            row = stage[0 : tiles[first + j][1], first + j, at : at + cols]
            if work.plan.with_residual:
                nisa.tensor_tensor(dst=row, data1=sums[j], data2=row, op=nl.add)
            else:
                nisa.activation(dst=row, op=nl.silu if work.plan.silu else nl.copy, data=sums[j])


def copy_rows(
    stage: Tensor, hbm: Tensor, first_token: int, tiles: list, first_col: int, cols: int, to_hbm: bool
) -> None:
    """Staged rows to HBM `[T, columns]`, or from there."""
    for i in range(len(tiles)):
        start, size = tiles[i]
        rows = hbm[first_token + start : first_token + start + size, first_col : first_col + cols]
        staged = stage[0:size, i, 0:cols]
        if to_hbm:
            nisa.dma_copy(dst=rows, src=staged)
        else:
            nisa.dma_copy(dst=staged, src=rows)


def transposed_output(work: Workspace, source: Tensor, out: Tensor, first_token: int, tokens: int) -> None:
    """out `[columns, T]` = (source W)^T, staged one column tile at a time in the rows area of the plan."""
    matrix: Any = work.plan.products.down_second
    widths = pieces(tokens, work.plan.moving_tokens)
    for n in range(matrix.col_tiles()):
        cols = matrix.tile_width(n)
        stage = work.output_turn(n)[0:cols, :]
        sums = transposed_tile(work.stream, matrix, n, source, widths, work.identity)
        for j in range(len(widths)):
            start, width = widths[j]
            nisa.activation(
                dst=stage[:, start : start + width], op=nl.silu if work.plan.silu else nl.copy, data=sums[j]
            )
        nisa.dma_copy(
            dst=out[n * PMAX : n * PMAX + cols, first_token : first_token + tokens], src=stage[:, 0:tokens]
        )


def finish(work: Workspace, out: Tensor, residual: Tensor, first_token: int, tokens: int) -> None:
    """The down projection of a block, from h on chip to HBM: natural or transposed."""
    source = work.h
    if work.plan.runs_down_first:
        down_first_product(work, tokens)
        source = work.down_z
    if work.plan.natural_output:
        natural_output(work, source, out, residual, first_token, tokens)
    else:
        transposed_output(work, source, out, first_token, tokens)
