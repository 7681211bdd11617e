"""Element types: the names that kernels use, as numpy types. tfloat32 is not modelled (numpy has no storage
for it).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

float32 = np.dtype(np.float32)
float16 = np.dtype(np.float16)
bfloat16 = np.dtype(ml_dtypes.bfloat16)
float8_e4m3 = np.dtype(ml_dtypes.float8_e4m3)  # up to 240: the variant of trn1 and trn2
float8_e5m2 = np.dtype(ml_dtypes.float8_e5m2)
int32 = np.dtype(np.int32)
uint32 = np.dtype(np.uint32)
int16 = np.dtype(np.int16)
uint16 = np.dtype(np.uint16)
int8 = np.dtype(np.int8)
uint8 = np.dtype(np.uint8)

FLOATS = (float32, float16, bfloat16, float8_e4m3, float8_e5m2)
MATMUL_INPUTS = tuple(dtype.name for dtype in FLOATS)
BIAS = (float32, float16, bfloat16)
UNWRITTEN_INT = 4  # what the vendor's simulator leaves in integer memory


def fill_unwritten(data: np.ndarray) -> None:
    """What memory holds before anyone writes it: NaN, or 4 for integers."""
    data.fill(np.nan if data.dtype in FLOATS else UNWRITTEN_INT)


def round_to(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """fp32 results as `dtype`: to nearest even; integers saturate."""
    if dtype in FLOATS:
        return values.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values), limits.min, limits.max).astype(dtype)
