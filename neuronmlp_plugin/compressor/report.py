"""The numbers of a report that come from the loss curves: what other sizes would cost, and the spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neuronmlp_plugin.compressor.settings import Settings
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.lowrank.allocate import CHOOSERS, Layer, loss
from neuronmlp_plugin.models.factors import PROJECTIONS

_GRID = (0.02, 0.05, 0.08, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50, 0.60)
_SPECTRUM_POINTS = 64


def loss_by_size(layers: Sequence[Layer], settings: Settings) -> list[dict[str, float]]:
    """The predicted loss at other sizes, as far as the form can go, chosen by predicted losses alone: not
    measured, not priced.
    """
    points, choose = [], CHOOSERS[settings.allocation]
    for removed in sorted({*_GRID, *([] if settings.remove is None else [settings.remove])}):
        try:
            choices = choose(layers, 1.0 - removed, settings.form, settings.rank_multiple)
        except UsageError:  # beyond what the form, or the multiple, can do
            continue
        points.append({"removed_ratio": removed, "predicted_loss": loss(layers, choices)})
    return points


def spectra(layers: Sequence[Layer]) -> dict[str, Any]:
    """Share of the output energy that each matrix loses at (at most 64) ranks of a group from 0 to full, to
    four digits, while it has all its channels.

    `{"ranks": [...], "layers": [{projection: [...]}, ...]}`: all three matrices of a layer have the same full
    rank, min(H, I / groups).
    """
    tails = [[curve.tail for curve in layer[0].curves] for layer in layers]
    ranks = np.unique(np.linspace(0, len(tails[0][0]) - 1, _SPECTRUM_POINTS).round().astype(int))
    lost = [
        [[float(f"{share:.4g}") for share in tail[ranks] / max(float(tail[0]), 1e-300)] for tail in layer]
        for layer in tails
    ]
    return {"ranks": ranks.tolist(), "layers": [dict(zip(PROJECTIONS, layer, strict=True)) for layer in lost]}
