"""The reference of every kernel: the formula, rounded to the storage type exactly where the kernels store (z,
h, y), fp32 elsewhere.

Arrays are natural `[T, features]`; a projection is a mapping from FORMAT.md's suffixes to weights `[out,
in]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]


def matmul(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x weight^T in fp32; x `[T, in]`, weight `[out, in]`."""
    return x.astype(np.float32) @ weight.astype(np.float32).T


def output_projection(x: np.ndarray, weights: Weights) -> np.ndarray:
    """gate or up in fp32; a compact one's pivots are z as stored."""
    if "weight" in weights:
        return matmul(x, weights["weight"])
    z = matmul(x, weights["u.weight"]).astype(x.dtype)
    if "v.weight" in weights:
        return matmul(z, weights["v.weight"])
    return np.concatenate([z.astype(np.float32), matmul(z, weights["c.weight"])], axis=1)


def input_projection(h: np.ndarray, weights: Weights) -> np.ndarray:
    """down in fp32; h `[T, I]`."""
    if "weight" in weights:
        return matmul(h, weights["weight"])
    if "u.weight" in weights:
        z = matmul(h, weights["u.weight"])
    else:
        rank = weights["c.weight"].shape[0]
        z = h[:, :rank].astype(np.float32) + matmul(h[:, rank:], weights["c.weight"])
    return matmul(z.astype(h.dtype), weights["v.weight"])


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


def gated_up(x: np.ndarray, gate: Weights, up: Weights) -> np.ndarray:
    """x `[T, H]` -> h `[T, I]` (the kernel returns its transpose)."""
    return (silu(output_projection(x, gate)) * output_projection(x, up)).astype(x.dtype)


def down(h: np.ndarray, weights: Weights, residual: np.ndarray | None = None) -> np.ndarray:
    """h `[T, I]` -> y `[T, H]`."""
    y = input_projection(h, weights)
    return (y if residual is None else y + residual.astype(np.float32)).astype(h.dtype)


def svd_mlp(
    x: np.ndarray,
    projections: Mapping[str, Weights],
    norm: tuple[np.ndarray, float] | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """x `[T, H]` -> y `[T, H]`; `norm` is (weight `[H]`, eps)."""
    if norm is not None:
        x = rms_norm(x, *norm)
    return down(
        gated_up(x, projections["gate_proj"], projections["up_proj"]), projections["down_proj"], residual
    )
