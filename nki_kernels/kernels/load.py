"""Activations from HBM into the layout that products take: `[128, row tiles, tokens]`, features on the
partitions.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nl
from nki_kernels.targets import PMAX
from nki_kernels.tiling import MOVING_COLS, pieces, tile_count

Tensor = Any


class Norm(nl.NKIObject):
    """RMSNorm: its weight as packed by `pack_norm`, and the small tiles that it needs."""

    def __init__(self, packed_weight: Tensor, eps: float) -> None:
        self.weight = nl.ndarray(packed_weight.shape, dtype=nl.float32, buffer=nl.sbuf, name="norm_weight")
        nisa.dma_copy(dst=self.weight, src=packed_weight)
        self.eps = nl.ndarray((PMAX, 1), dtype=nl.float32, buffer=nl.sbuf, name="norm_eps")
        nisa.memset(self.eps, eps)
        self.sums = []
        for i in range(2):
            self.sums.append(nl.ndarray((PMAX, 1), dtype=nl.float32, buffer=nl.sbuf, name=f"norm_sum{i}"))

    def normalise(self, row: Tensor, scratch: Tensor, turn: int) -> None:
        """scratch = row / sqrt(mean(row^2) + eps), tokens on the partitions; the weight is applied after the
        transpose.
        """
        tokens, hidden = row.shape
        total = self.sums[turn % 2][0:tokens, :]
        nisa.activation(
            dst=scratch,
            op=nl.square,
            data=row,
            reduce_op=nl.add,
            reduce_res=total,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )
        nisa.activation(dst=total, op=nl.rsqrt, data=total, bias=self.eps[0:tokens, :], scale=1.0 / hidden)
        nisa.tensor_scalar(dst=scratch, data=row, op0=nl.multiply, operand0=total)


def load_transposed(dst: Tensor, src: Tensor, first_token: int, tokens: int) -> None:
    """dst `[128, row tiles, tokens]` from src `[features, T]`."""
    features = src.shape[0]
    for k in range(tile_count(features)):
        rows = min(PMAX, features - k * PMAX)
        nisa.dma_copy(
            dst=dst[0:rows, k, 0:tokens],
            src=src[k * PMAX : k * PMAX + rows, first_token : first_token + tokens],
        )


def load_natural(dst: Tensor, src: Tensor, first_token: int, tokens: int, rows: Tensor, norms: list) -> None:
    """dst `[128, row tiles, tokens]` from src `[T, features]`, transposed on TensorE; normalised on the way
    by the one of `norms`, if any.

    `rows` `[128, 2 or 3, features]` is room for two raw tiles of 128 tokens and, with a norm, one normalised
    tile.
    """
    tiles = pieces(tokens, PMAX)
    for i in range(len(tiles)):
        start, size = tiles[i]
        row = rows[0:size, i % 2, :]
        nisa.dma_copy(dst=row, src=src[first_token + start : first_token + start + size, :])
        for norm in norms:
            norm.normalise(row, rows[0:size, 2, :], i)
            row = rows[0:size, 2, :]
        transpose_row(dst[:, :, start : start + size], row, norms)


def transpose_row(dst: Tensor, row: Tensor, norms: list) -> None:
    """dst `[128, row tiles, size]` = row `[size, features]` transposed, several row tiles to a PSUM bank."""
    size, features = row.shape
    whole = features // PMAX
    # gen2 gives transposes in fp32 only; later generations in the type of the data.
    psum_dtype = nl.float32 if nisa.get_nc_version() == nisa.nc_version.gen2 else row.dtype
    groups = pieces(whole, max(1, MOVING_COLS // size))
    for first, count in groups:
        bank = nl.ndarray((PMAX, count, size), dtype=psum_dtype, buffer=nl.psum)
        for j in range(count):
            nisa.nc_transpose(dst=bank[:, j, :], data=row[:, (first + j) * PMAX : (first + j + 1) * PMAX])
        evict_transposed(dst[:, first : first + count, :], bank, norms, first)
    left = features - whole * PMAX
    if left:
        bank = nl.ndarray((left, 1, size), dtype=psum_dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=bank[:, 0, :], data=row[:, whole * PMAX : features])
        evict_transposed(dst[0:left, whole : whole + 1, :], bank, norms, whole)


def evict_transposed(dst: Tensor, bank: Tensor, norms: list, first: int) -> None:
    """PSUM `[rows, count, size]` to SBUF, times the norm's weight of each feature; `first` is the row tile of
    bank[:, 0].
    """
    if len(norms) == 0:
        nisa.activation(dst=dst, op=nl.copy, data=bank)
        return
    rows, count, _size = bank.shape
    for j in range(count):
        nisa.activation(
            dst=dst[:, j, :],
            op=nl.copy,
            data=bank[:, j, :],
            scale=norms[0].weight[0:rows, first + j : first + j + 1],
        )


def load_gathered(dst: Tensor, src: Tensor, share: tuple, first_token: int, tokens: int) -> None:
    """One projection's whole z out of an all-gather of several.

    dst `[128, row tiles, tokens]`; src `[tp * stride, T]`, rank-major. With share = (base, slots, stride),
    row r * slots + i of z is row r * stride + base + i of src.
    """
    base, slots, stride = share
    for r in range(src.shape[0] // stride):
        row, end = r * slots, (r + 1) * slots
        while row < end:
            k, partition = row // PMAX, row % PMAX
            size = min(end - row, PMAX - partition)
            at = r * stride + base + row - r * slots
            rows = src[at : at + size, first_token : first_token + tokens]
            nisa.dma_copy(dst=dst[partition : partition + size, k, 0:tokens], src=rows)
            row += size


def store_transposed(dst: Tensor, src: Tensor, first_token: int, tokens: int) -> None:
    """dst `[features, T]` from src `[128, row tiles, tokens]`."""
    features = dst.shape[0]
    for k in range(tile_count(features)):
        rows = min(PMAX, features - k * PMAX)
        nisa.dma_copy(
            dst=dst[k * PMAX : k * PMAX + rows, first_token : first_token + tokens],
            src=src[0:rows, k, 0:tokens],
        )
