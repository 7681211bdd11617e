"""What published algorithms cost under our own model, at any of their sizes (bf16). Each is an Estimate of
one launch, or of two.
"""

from __future__ import annotations

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
OPERAND_BYTES = 2 * 2 * 8 * BLOCK * 2  # two turns of both operands' blocks, per partition


def _array(*shape: int) -> Placeholder:
    return Placeholder(shape, BF16)


def tutorial(
    name: str, m: int, k: int, n: int, target: Target = TRN1, constants: Constants = CALIBRATED
) -> Estimate:
    """The tutorial's steps before blocking K, "tiled", "hoisted" or "wide", which repeat over rows of output."""
    kernel, rows = TUTORIAL_ROWS[name]
    return extrapolate(
        lambda count: price(kernel, (_array(k, count * rows), _array(k, n)), target, constants), m // rows
    )


def sums_fit(m: int, target: Target) -> bool:
    """Whether SBUF holds the running sums of a block of columns beside the operands."""
    return m // PMAX * N_COLS * 2 + OPERAND_BYTES <= target.sbuf_usable_bytes


def aws_matmul(m: int, k: int, n: int, target: Target = TRN1, constants: Constants = CALIBRATED) -> Estimate:
    """AWS's fully optimised matmul with the authors' blocks of 1024; its sums spill to HBM where they do not
    fit.
    """
    m_tiles = min(BLOCK, m) // PMAX
    kernel = matmul_blocked if sums_fit(m, target) else matmul_spilling
    return extrapolate(
        lambda count: price(kernel, (_array(k, m), _array(k, count * N_COLS), m_tiles), target, constants),
        n // N_COLS,
    )


def aws_twice(
    t: int, k: int, r: int, n: int, target: Target = TRN1, constants: Constants = CALIBRATED
) -> Estimate:
    """The same kernel on the factors, one after the other; z crosses HBM."""
    return aws_matmul(t, k, r, target, constants) + aws_matmul(t, r, n, target, constants)


def paper_fused(
    t: int, k: int, r: int, n: int, target: Target = TRN1, constants: Constants = CALIBRATED
) -> Estimate:
    """The paper's fused kernel with its blocks of 1024."""
    arrays = (_array(k, r), _array(r, n))
    return extrapolate(
        lambda count: price(blocked_xuv, (_array(k, count * BLOCK), *arrays), target, constants), t // BLOCK
    )
