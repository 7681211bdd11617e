"""Activations from HBM into the layout that products take, and back: `[128, row tiles, tokens]`, features on
the partitions.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nl
from nki_kernels.kernels.matmul import matmul
from nki_kernels.kernels.workspace import Workspace
from nki_kernels.targets import PMAX
from nki_kernels.tiling import MOVING_COLS, pieces, tile_count

Tensor = Any
# `dge_mode.none` everywhere: descriptors fixed at compile time. Before trn2 no hardware makes them, and
# software ones would be GpSimd's work, which takes turns with VectorE at SBUF.


def load_transposed(dst: Tensor, src: Tensor, tiles: tuple, first_token: int, tokens: int) -> None:
    """Row tiles (first, count) of dst `[128, row tiles, tokens]` from src `[features, T]`."""
    features = src.shape[0]
    for k in range(tiles[0], tiles[0] + tiles[1]):
        rows = min(PMAX, features - k * PMAX)
        nisa.dma_copy(
            dst=dst[0:rows, k, 0:tokens],
            src=src[k * PMAX : k * PMAX + rows, first_token : first_token + tokens],
            dge_mode=nisa.dge_mode.none,
        )


def load_natural(work: Workspace, dst: Tensor, src: Tensor, first_token: int, tokens: int) -> None:
    """dst `[128, row tiles, tokens]` from src `[T, features]`, transposed on TensorE; normalised on the way
    if the plan says so.
    """
    tiles = pieces(tokens, PMAX)
    rows = work.input_rows(src.shape[1])
    for i in range(len(tiles)):
        start, size = tiles[i]
        # Two in turn: the next rows arrive while these are transposed.
        row = rows[i % 2]
        nisa.dma_copy(
            dst=row[0:size, :],
            src=src[first_token + start : first_token + start + size, :],
            dge_mode=nisa.dge_mode.none,
        )
        for norm in work.norms:
            norm.normalise(row, rows[2], size, i)
            row = rows[2]
        transpose_row(work, dst, row, start, size, work.norms)


def transpose_row(work: Workspace, dst: Tensor, row: Tensor, start: int, size: int, norms: list) -> None:
    """dst[:, :, start : start + size] = the first `size` partitions of row `[128, features]` transposed,
    several row tiles to a PSUM bank; times the weight of the one of `norms`, if any.

    A product with our own identity: `nc_transpose` would do the same with one that the compiler adds.
    """
    features = row.shape[1]
    whole = features // PMAX
    # A bank has MOVING_COLS fp32 a partition: room for so many tiles of `size` tokens, which one instruction
    # evicts.
    groups = pieces(whole, max(1, MOVING_COLS // size))
    for g in range(len(groups)):
        first, count = groups[g]
        bank = work.banks.tile((PMAX, count, size))
        for j in range(count):
            col = (first + j) * PMAX
            # stationary^T @ 1 is the row tile turned round; each is a sum of its own, so each begins one.
            matmul(bank[:, j, :], row[0:size, col : col + PMAX], work.identity[0:size, 0:size], True)
        evict_transposed(work, dst, bank, first, start, norms)
    left = features - whole * PMAX
    if left > 0:
        bank = work.banks.tile((left, 1, size))
        matmul(bank[:, 0, :], row[0:size, whole * PMAX : features], work.identity[0:size, 0:size], True)
        evict_transposed(work, dst, bank, whole, start, norms)


def evict_transposed(work: Workspace, dst: Tensor, bank: Tensor, first: int, start: int, norms: list) -> None:
    """PSUM `[rows, count, size]` to SBUF, times the norm's weight of each feature; `first` is the row tile of
    bank[:, 0].
    """
    rows, count, size = bank.shape
    bias = work.zero[0:rows, :]
    if len(norms) == 0:
        there = dst[0:rows, first : first + count, start : start + size]
        nisa.activation(dst=there, op=nl.copy, data=bank, bias=bias)
        return
    weight = norms[0].weight
    # The weight goes by feature, so by partition, and is another one in each row tile: an eviction for each.
    for j in range(count):
        nisa.activation(
            dst=dst[0:rows, first + j, start : start + size],
            op=nl.copy,
            data=bank[:, j, :],
            bias=bias,
            scale=weight[0:rows, first + j : first + j + 1],
        )


def load_gathered(dst: Tensor, src: Tensor, share: tuple, where: tuple) -> None:
    """One projection's whole z out of an all-gather of several; where = (first token, tokens).

    dst `[128, row tiles, tokens]`; src `[tp * stride, T]`, core after core. With share = (base, slots,
    stride), row r * slots + i of z is row r * stride + base + i of src.
    """
    base, slots, stride = share
    first_token, tokens = where
    for r in range(src.shape[0] // stride):
        row, end = r * slots, (r + 1) * slots
        while row < end:
            k, partition = row // PMAX, row % PMAX
            # A core's share ends inside a row tile as a rule, and the next one's begins there.
            size = min(end - row, PMAX - partition)
            at = r * stride + base + row - r * slots
            nisa.dma_copy(
                dst=dst[partition : partition + size, k, 0:tokens],
                src=src[at : at + size, first_token : first_token + tokens],
                dge_mode=nisa.dge_mode.none,
            )
            row += size


def load_gathered_natural(work: Workspace, dst: Tensor, src: Tensor, share: tuple, where: tuple) -> None:
    """As `load_gathered`, from src `[tp * T, stride]`: rows of all cores side by side, then transposed."""
    base, slots, _stride = share
    first_token, tokens = where
    cores = src.shape[0] // work.plan.tokens
    rows = work.z_rows(cores * slots)
    tiles = pieces(tokens, PMAX)
    for i in range(len(tiles)):
        start, size = tiles[i]
        row = rows[i % 2]
        for r in range(cores):
            first = r * work.plan.tokens + first_token + start
            nisa.dma_copy(
                dst=row[0:size, r * slots : (r + 1) * slots],
                src=src[first : first + size, base : base + slots],
                dge_mode=nisa.dge_mode.none,
            )
        transpose_row(work, dst, row, start, size, [])


def store_natural(
    work: Workspace, dst: Tensor, src: Tensor, channels: tuple, first_col: int, where: tuple
) -> None:
    """dst[rows, first_col : first_col + count] from channels (first, count) of src `[128, row tiles,
    tokens]`, transposed on TensorE; where = (first row of dst, tokens).
    """
    first, count = channels
    first_row, tokens = where
    rows = work.z_rows(count)
    tiles = pieces(tokens, PMAX)
    banks = pieces(count, MOVING_COLS)
    for i in range(len(tiles)):
        start, size = tiles[i]
        row = rows[i % 2]
        for b in range(len(banks)):
            col, cols = banks[b]
            bank = natural_bank(work, src, (first + col, cols), tiles[i])
            nisa.activation(
                dst=row[0:size, col : col + cols], op=nl.copy, data=bank, bias=work.zero[0:size, :]
            )
        nisa.dma_copy(
            dst=dst[first_row + start : first_row + start + size, first_col : first_col + count],
            src=row[0:size, :],
            dge_mode=nisa.dge_mode.none,
        )


def natural_bank(work: Workspace, src: Tensor, channels: tuple, tokens: tuple) -> Tensor:
    """PSUM `[size, count]`: channels (first, count <= 512) of src `[128, row tiles, tokens]` for tokens
    (start, size), piece by piece of the row tiles that they lie in.
    """
    first, count = channels
    start, size = tokens
    bank = work.banks.tile((size, count))
    done = 0
    while done < count:
        k, partition = (first + done) // PMAX, (first + done) % PMAX
        cols = min(count - done, PMAX - partition)
        end = partition + cols
        # Rows from 0 on, though those before `partition` are not wanted: operands may begin at partitions 0,
        # 32, 64 or 96 alone. The columns of the identity choose the rows.
        matmul(
            bank[:, done : done + cols],
            src[0:end, k, start : start + size],
            work.identity[0:end, partition:end],
            True,
        )
        done += cols
    return bank


def store_transposed(dst: Tensor, first_row: int, src: Tensor, features: int, where: tuple) -> None:
    """dst[first_row : first_row + features, tokens] from src `[128, row tiles, tokens]`; where = (first
    token, tokens).
    """
    first_token, tokens = where
    for k in range(tile_count(features, PMAX)):
        rows = min(PMAX, features - k * PMAX)
        row = first_row + k * PMAX
        nisa.dma_copy(
            dst=dst[row : row + rows, first_token : first_token + tokens],
            src=src[0:rows, k, 0:tokens],
            dge_mode=nisa.dge_mode.none,
        )
