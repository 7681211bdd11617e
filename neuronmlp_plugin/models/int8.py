"""int8 weights with one scale per output channel: w = q scale, symmetric, without zero points (FORMAT.md,
"int8").
"""

from __future__ import annotations

import torch

LIMIT = 127  # -128 is left out, so that -w is stored as exactly as w


def scales_of(weight: torch.Tensor) -> torch.Tensor:
    """`[out, in]` -> fp32 `[out]`: a channel's largest magnitude over 127, so that nothing is clipped; 0 for
    a channel of zeros.
    """
    return weight.float().abs().amax(dim=1) / LIMIT


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[out, in]` of any floating dtype -> q int8 `[out, in]` and scale fp32 `[out]` with |weight - q scale|
    <= scale / 2.
    """
    scale = scales_of(weight)
    steps = weight.float() / scale.where(scale > 0, 1.0)[:, None]
    return steps.round().clamp(-LIMIT, LIMIT).to(torch.int8), scale


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 matrix `[out, in]` that q int8 `[out, in]` and scale fp32 `[out]` stand for."""
    return q.float() * scale[:, None]
