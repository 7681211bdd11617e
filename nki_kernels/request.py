"""What a launch has to do: everything that a plan depends on besides the target."""

from __future__ import annotations

import dataclasses

import numpy as np

from nki_kernels.layout import Layout

# A row that leaves for a collective, or comes back from one, is at least this long: shorter ones cost a DMA
# queue as much [dma].
MIN_ROW_BYTES = 512


@dataclasses.dataclass(frozen=True)
class Request:
    """One launch of `layout` over `tokens` tokens, weights and activations of `dtype`."""

    layout: Layout
    tokens: int
    dtype: np.dtype
    norm_eps: float | None = None
    residual: bool = False
    silu: bool = False
    transposed_input: bool = False


def z_is_natural(tokens: int, dtype: np.dtype) -> bool:
    """Whether z travels between collectives as `[T, channels]`: where rows of `[channels, T]` would be
    short.
    """
    return tokens * dtype.itemsize < MIN_ROW_BYTES


def stage_request(layout: Layout, tokens: int, dtype: np.dtype, norm_eps: float | None = None) -> Request:
    """What a launch of one tensor-parallel core has to do; `norm_eps` counts where it starts from x.

    The last one, which takes down's z from the reduce-scatter, finds it as `z_is_natural` says.
    """
    is_last = layout.hidden == 0 and layout.gate_second is None and layout.down_first is None
    return Request(
        layout,
        tokens,
        dtype,
        norm_eps if layout.hidden else None,
        transposed_input=is_last and not z_is_natural(tokens, dtype),
    )
