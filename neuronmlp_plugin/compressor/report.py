"""The numbers of a report that come from the loss curves: what other sizes would cost, and the spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neuronmlp_plugin.compressor.settings import Settings
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.lowrank.allocate import CHOOSERS, Curve
from neuronmlp_plugin.models.factors import PROJECTIONS

_GRID = (0.02, 0.05, 0.08, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50, 0.60)
_SPECTRUM_POINTS = 64


def loss_by_size(curves: Sequence[Curve], settings: Settings) -> list[dict[str, float]]:
    """The predicted loss at other sizes, as far as the form can go, with ranks from predicted losses alone:
    not measured, not priced.
    """
    points, choose = [], CHOOSERS[settings.allocation]
    for removed in sorted({*_GRID, *([] if settings.remove is None else [settings.remove])}):
        try:
            ranks = choose(curves, 1.0 - removed, settings.form, settings.rank_multiple)
        except UsageError:  # beyond what the form, or the multiple, can do
            continue
        loss = sum(float(c.tail[rank]) for c, rank in zip(curves, ranks, strict=True) if rank is not None)
        points.append({"removed_ratio": removed, "predicted_loss": loss})
    return points


def spectra(curves: Sequence[Curve]) -> dict[str, Any]:
    """Share of the output energy that each matrix loses at (at most 64) ranks from 0 to full, to four digits.

    `{"ranks": [...], "layers": [{projection: [...]}, ...]}`: all three matrices of a layer have the same full
    rank, min(H, I).
    """
    full = len(curves[0].tail) - 1
    ranks = np.unique(np.linspace(0, full, _SPECTRUM_POINTS).round().astype(int))
    lost = [
        [float(f"{share:.4g}") for share in c.tail[ranks] / max(float(c.tail[0]), 1e-300)] for c in curves
    ]
    layers = [dict(zip(PROJECTIONS, lost[i : i + 3], strict=True)) for i in range(0, len(lost), 3)]
    return {"ranks": ranks.tolist(), "layers": layers}
