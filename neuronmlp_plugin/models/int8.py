"""int8 weights with one scale per output channel: w = q scale, symmetric, without zero points (FORMAT.md, "int8")."""

from __future__ import annotations

import torch

LIMIT = 127  # -128 is left out, so that -w is stored as exactly as w


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[out, in]` of any floating dtype -> q int8 `[out, in]` and scale fp32 `[out]` with |weight - q scale| <= scale / 2.

    The scale of a channel is its largest magnitude over 127, so nothing is clipped; a channel of zeros has scale 0.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1) / LIMIT
    steps = weight / scale.where(scale > 0, 1.0)[:, None]
    return steps.round().clamp(-LIMIT, LIMIT).to(torch.int8), scale


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 matrix `[out, in]` that q int8 `[out, in]` and scale fp32 `[out]` stand for."""
    return q.float() * scale[:, None]
