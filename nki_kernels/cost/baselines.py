"""What published algorithms cost under our own model, at any of their sizes (bf16). Each is an Estimate of
one launch, or of two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from nki_kernels.cost.constants import CALIBRATED, Constants
from nki_kernels.cost.estimate import Estimate, extrapolate, price
from nki_kernels.kernels.plain_matmul import matmul_blocked, matmul_hoisted, matmul_tiled
from nki_kernels.kernels.published import BLOCK, blocked_xuv, matmul_spilling, matmul_wide
from nki_kernels.simulator import Placeholder
from nki_kernels.targets import PMAX, TRN1, Target
from nki_kernels.tiling import MOVING_COLS

BF16 = np.dtype(ml_dtypes.bfloat16)
TUTORIAL_ROWS = {
    "tiled": (matmul_tiled, PMAX),
    "hoisted": (matmul_hoisted, PMAX),
    "wide": (matmul_wide, 2 * PMAX),
}
N_COLS = 2 * MOVING_COLS  # a block of columns
K_TILES = 8  # row tiles of a block of either operand
STAGING_BYTES = 16 * 1024  # per partition: four row tiles of spilled sums on their way


def _array(*shape: int) -> Placeholder:
    return Placeholder(shape, BF16)


def tutorial(
    name: str, m: int, k: int, n: int, target: Target = TRN1, constants: Constants = CALIBRATED
) -> Estimate:
    """The tutorial's steps before blocking K, "tiled", "hoisted" or "wide", which repeat over rows of
    output.
    """
    kernel, rows = TUTORIAL_ROWS[name]
    return extrapolate(
        lambda count: price(kernel, (_array(k, count * rows), _array(k, n)), target, constants), m // rows
    )


def held_row_tiles(m: int, m_tiles: int, target: Target) -> int | None:
    """Row tiles whose running sums stay on chip; None where all do, in the inputs' element type and beside
    two turns of both operands. Sums that do not fit are kept in fp32, beside one turn, and spill in part.
    """
    operands = K_TILES * 2 * (m_tiles * PMAX + N_COLS)
    if m // PMAX * N_COLS * 2 + 2 * operands <= target.sbuf_usable_bytes:
        return None
    return (target.sbuf_usable_bytes - operands - STAGING_BYTES) // (N_COLS * 4)


@functools.lru_cache(maxsize=64)
def aws_matmul(
    m: int, k: int, n: int, target: Target = TRN1, constants: Constants = CALIBRATED, m_tiles: int = 8
) -> Estimate:
    """AWS's fully optimised matmul, [K, M] and [K, N] to [M, N], with the paper's authors' blocks of 1024
    rows (the tutorial's are of 2048: `m_tiles` 16).
    """
    m_tiles = min(m_tiles, m // PMAX)
    held = held_row_tiles(m, m_tiles, target)
    kernel: Callable[..., Any] = matmul_blocked if held is None else matmul_spilling
    blocks = (m_tiles, max(1, min(2, n // MOVING_COLS))) if held is None else (held, m_tiles)
    cols = min(N_COLS, n)
    return extrapolate(
        lambda count: price(kernel, (_array(k, m), _array(k, count * cols), *blocks), target, constants),
        n // cols,
    )


def aws_twice(
    t: int, k: int, r: int, n: int, target: Target = TRN1, constants: Constants = CALIBRATED
) -> Estimate:
    """The same kernel on the factors, one after the other: z^T from U and x^T, which is lhsT of the
    second.
    """
    return aws_matmul(r, k, t, target, constants) + aws_matmul(t, r, n, target, constants)


@functools.lru_cache(maxsize=64)
def paper_fused(
    t: int, k: int, r: int, n: int, target: Target = TRN1, constants: Constants = CALIBRATED
) -> Estimate:
    """The paper's fused kernel with its blocks of 1024."""
    arrays = (_array(k, r), _array(r, n))
    return extrapolate(
        lambda count: price(blocked_xuv, (_array(k, count * BLOCK), *arrays), target, constants), t // BLOCK
    )
