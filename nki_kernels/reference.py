"""The reference of every kernel: the formula, rounded to the storage type exactly where the kernels store (z,
h, y), fp32 elsewhere.

Arrays are natural `[T, features]`; a projection is a mapping from FORMAT.md's suffixes to weights `[out,
in]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]


SCALE = "_scale"  # behind a suffix: the scales `[out]` of int8 weights (FORMAT.md)


def matmul(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x weight^T in fp32; x `[T, in]`, weight `[out, in]`."""
    return x.astype(np.float32) @ weight.astype(np.float32).T


def product(x: np.ndarray, weights: Weights, suffix: str, part: slice = slice(None)) -> np.ndarray:
    """x W^T in fp32 for rows `part` of a weight; an int8 one is scaled behind the sum."""
    y = matmul(x, weights[suffix][part])
    return y * weights[suffix + SCALE][part].astype(np.float32) if suffix + SCALE in weights else y


def groups_of(size: int, groups: int) -> list[slice]:
    """Equal, contiguous parts of `size` rows."""
    step = size // groups
    return [slice(start, start + step) for start in range(0, size, step)]


def output_projection(x: np.ndarray, weights: Weights, groups: int = 1) -> np.ndarray:
    """gate or up in fp32; a compact one's pivots are z as stored. Second factors are block-diagonal over
    `groups`, their blocks stacked.
    """
    if "weight" in weights:
        return product(x, weights, "weight")
    z = product(x, weights, "u.weight").astype(x.dtype)
    second = "v.weight" if "v.weight" in weights else "c.weight"
    parts = []
    rows = groups_of(weights[second].shape[0], groups)
    for z_part, part in zip(np.split(z, groups, axis=1), rows, strict=True):
        if second == "c.weight":
            parts.append(z_part.astype(np.float32))
        parts.append(product(z_part, weights, second, part))
    return np.concatenate(parts, axis=1)


def input_projection(h: np.ndarray, weights: Weights, groups: int = 1) -> np.ndarray:
    """down in fp32; h `[T, I]`. First factors are block-diagonal over `groups`, their blocks stacked."""
    if "weight" in weights:
        return product(h, weights, "weight")
    first = "u.weight" if "u.weight" in weights else "c.weight"
    parts = []
    rows = groups_of(weights[first].shape[0], groups)
    for h_part, part in zip(np.split(h, groups, axis=1), rows, strict=True):
        # c has R rows a group, and a group has as many pivots.
        pivots = 0 if first == "u.weight" else part.stop - part.start
        z = product(h_part[:, pivots:], weights, first, part)
        parts.append(z + h_part[:, :pivots].astype(np.float32) if pivots else z)
    return product(np.concatenate(parts, axis=1).astype(h.dtype), weights, "v.weight")


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x), fp32."""
    return x / (np.float32(1) + np.exp(-x))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Hugging Face's order: normalise in fp32, round, then multiply by the weight."""
    wide = x.astype(np.float32)
    scale = np.float32(1) / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + np.float32(eps))
    return ((wide * scale).astype(x.dtype).astype(np.float32) * weight.astype(np.float32)).astype(x.dtype)


def xuv(x: np.ndarray, weights: Weights, activate: bool = False) -> np.ndarray:
    """x `[T, K]` -> `[T, N]` for `uv`, input-pivoted `compact` and `dense` weights."""
    y = input_projection(x, weights)
    return (silu(y) if activate else y).astype(x.dtype)


def gated_up(x: np.ndarray, gate: Weights, up: Weights, groups: int = 1) -> np.ndarray:
    """x `[T, H]` -> h `[T, I]` (the kernel returns its transpose)."""
    return (silu(output_projection(x, gate, groups)) * output_projection(x, up, groups)).astype(x.dtype)


def down(h: np.ndarray, weights: Weights, residual: np.ndarray | None = None, groups: int = 1) -> np.ndarray:
    """h `[T, I]` -> y `[T, H]`."""
    y = input_projection(h, weights, groups)
    return (y if residual is None else y + residual.astype(np.float32)).astype(h.dtype)


def svd_mlp(
    x: np.ndarray,
    projections: Mapping[str, Weights],
    norm: tuple[np.ndarray, float] | None = None,
    residual: np.ndarray | None = None,
    groups: int = 1,
) -> np.ndarray:
    """x `[T, H]` -> y `[T, H]`; `norm` is (weight `[H]`, eps)."""
    if norm is not None:
        x = rms_norm(x, *norm)
    h = gated_up(x, projections["gate_proj"], projections["up_proj"], groups)
    return down(h, projections["down_proj"], residual, groups)
