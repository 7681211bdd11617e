"""The stages of a gated MLP over one block of tokens. Every kernel of this package is a choice of them."""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nl
from nki_kernels.kernels.load import Norm
from nki_kernels.kernels.products import column_tile, natural_tile, transposed_product, transposed_tile
from nki_kernels.kernels.stream import WeightStream
from nki_kernels.plan import Plan, z_tiles
from nki_kernels.targets import PMAX
from nki_kernels.tiling import pieces, tile_count

Tensor = Any


class Workspace(nl.NKIObject):
    """Everything that a launch holds in SBUF, allocated once and exactly as the plan says; `views` of it are named by what they hold."""

    def __init__(self, plan: Plan, weights: Tensor, norm_weight: Tensor) -> None:
        layout = plan.layout
        self.plan = plan
        self.dtype = weights.dtype
        self.wide = nl.ndarray((PMAX, plan.wide_cols), dtype=self.dtype, buffer=nl.sbuf, name="wide")
        self.narrow = nl.ndarray((PMAX, plan.narrow_cols), dtype=self.dtype, buffer=nl.sbuf, name="narrow")
        self.stream = WeightStream(weights, plan.chunk_bounds, plan.ring_slots, plan.ring_cols)
        self.identity = None
        if layout.needs_identity:
            self.identity = nl.ndarray((PMAX, PMAX), dtype=self.dtype, buffer=nl.sbuf, name="identity")
            nisa.dma_copy(dst=self.identity, src=weights[:, layout.stored_cols : layout.packed_cols])
        self.activated = []
        if layout.gate_second is not None:
            for _i in range(2):
                self.activated.append(nl.ndarray((PMAX, plan.moving_tokens), dtype=nl.float32, buffer=nl.sbuf, name="activated"))
        self.norm = None if norm_weight is None else Norm(norm_weight, plan.norm_eps)

    def tiles(self, arena: Tensor, offset: int, count: int) -> Tensor:
        """`[128, count, block_tokens]` out of an arena."""
        tokens = self.plan.block_tokens
        return arena[:, offset : offset + count * tokens].reshape((PMAX, count, tokens))

    def x(self) -> Tensor:
        return self.tiles(self.wide, 0, tile_count(self.plan.layout.hidden))

    def h(self) -> Tensor:
        return self.tiles(self.wide, self.plan.h_offset, tile_count(self.plan.layout.intermediate))

    def z(self, projection: str) -> Tensor:
        return self.tiles(self.narrow, self.plan.narrow_offset(projection), z_tiles(self.plan.layout, projection))

    def source(self, projection: str) -> Tensor:
        """What the second matrix of "gate" or "up" starts from."""
        return self.z(projection) if self.plan.layout.has_z(projection) else self.x()

    def input_rows(self, features: int) -> Tensor:
        """`[128, 2 or 3, features]`: room for natural input on its way through the transpose."""
        count = 2 if self.norm is None else 3
        at = self.plan.input_rows_offset
        return self.wide[:, at : at + count * features].reshape((PMAX, count, features))

    def output_rows(self) -> Tensor:
        """`[128, token tiles, out_cols]`: natural results on their way out."""
        at, tiles, cols = self.plan.rows_offset, self.plan.token_tiles, self.plan.out_cols
        return self.wide[:, at : at + tiles * cols].reshape((PMAX, tiles, cols))

    def transposed_stage(self, n: int) -> Tensor:
        """`[128, block_tokens]`: one of two turns of a transposed column tile on its way out."""
        tokens = self.plan.block_tokens
        at = self.plan.rows_offset + n % 2 * tokens
        return self.wide[:, at : at + tokens]


def first_products(work: Workspace, tokens: int) -> None:
    """z of gate and of up, from x."""
    widths = pieces(tokens, work.plan.moving_tokens)
    for projection in ("gate", "up"):
        matrix = work.plan.layout.matrix(projection + "_first")
        if matrix is not None:
            transposed_product(work.stream, matrix, work.x(), work.z(projection), widths, work.identity)


def gated_product(work: Workspace, tokens: int) -> None:
    """h = silu(gate) * up, tile by tile of the intermediate channels; gate and up leave PSUM only as h."""
    layout = work.plan.layout
    widths = pieces(tokens, work.plan.moving_tokens)
    h = work.h()
    for n in range(layout.gate_second.col_tiles):
        cols = layout.gate_second.tile_width(n)
        gate = column_tile(work.stream, layout.gate_second, n, work.source("gate"), widths, work.identity)
        up = column_tile(work.stream, layout.up_second, n, work.source("up"), widths, work.identity)
        for j in range(len(widths)):
            start, width = widths[j]
            activated = work.activated[(n * len(widths) + j) % 2][0:cols, 0:width]
            nisa.activation(dst=activated, op=nl.silu, data=gate[j])
            nisa.tensor_tensor(dst=h[0:cols, n, start : start + width], data1=activated, data2=up[j], op=nl.multiply)


def down_first_product(work: Workspace, tokens: int) -> None:
    """z of down, from h; the pivots of a compact projection are added to the sum in PSUM, as identity blocks."""
    widths = pieces(tokens, work.plan.moving_tokens)
    transposed_product(work.stream, work.plan.layout.down_first, work.h(), work.z("down"), widths, work.identity)


def natural_output(work: Workspace, source: Tensor, out: Tensor, residual: Tensor, first_token: int, tokens: int) -> None:
    """out `[T, columns]` = source W (+ residual), staged in rows of `out_cols` columns so that stores are long."""
    matrix = work.plan.layout.down_second
    stage = work.output_rows()
    tiles = pieces(tokens, PMAX)
    for first_col, cols in pieces(matrix.cols, work.plan.out_cols):
        if residual is not None:
            copy_rows(stage, residual, first_token, tiles, first_col, cols, False)
        for n in range(first_col // matrix.tile_cols, tile_count(first_col + cols, matrix.tile_cols)):
            natural_column(work, source, stage, n, n * matrix.tile_cols - first_col, tiles, residual is not None)
        copy_rows(stage, out, first_token, tiles, first_col, cols, True)


def natural_column(work: Workspace, source: Tensor, stage: Tensor, n: int, at: int, tiles: list, adds: bool) -> None:
    """Column tile `n` of the output into stage[:, :, at:], a group of token tiles at a time."""
    matrix = work.plan.layout.down_second
    cols = matrix.tile_width(n)
    mark = work.stream.position
    group = work.plan.token_group
    for first, count in pieces(len(tiles), group):
        work.stream.seek(mark)
        sums = natural_tile(work.stream, matrix, n, source, tiles[first : first + count])
        for j in range(count):
            row = stage[0 : tiles[first + j][1], first + j, at : at + cols]
            if adds:
                nisa.tensor_tensor(dst=row, data1=sums[j], data2=row, op=nl.add)
            else:
                nisa.activation(dst=row, op=nl.silu if work.plan.silu else nl.copy, data=sums[j])


def copy_rows(stage: Tensor, hbm: Tensor, first_token: int, tiles: list, first_col: int, cols: int, to_hbm: bool) -> None:
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
    matrix = work.plan.layout.down_second
    widths = pieces(tokens, work.plan.moving_tokens)
    for n in range(matrix.col_tiles):
        cols = matrix.tile_width(n)
        stage = work.transposed_stage(n)[0:cols, :]
        sums = transposed_tile(work.stream, matrix, n, source, widths, work.identity)
        for j in range(len(widths)):
            start, width = widths[j]
            nisa.activation(dst=stage[:, start : start + width], op=nl.silu if work.plan.silu else nl.copy, data=sums[j])
        nisa.dma_copy(dst=out[n * PMAX : n * PMAX + cols, first_token : first_token + tokens], src=stage[:, 0:tokens])
