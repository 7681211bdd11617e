"""What a compression leaves for people to look at: numbers as JSON, and three plots."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from neuronmlp_plugin.compressor.settings import Settings
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.lowrank.allocate import CHOOSERS, Curve
from neuronmlp_plugin.models.projection import PROJECTIONS

REPORT_FILE = "neuronmlp_report.json"
_GRID = (0.02, 0.05, 0.08, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50, 0.60)
_COLOURS = {"gate_proj": "#0072b2", "up_proj": "#e69f00", "down_proj": "#009e73"}


def loss_by_size(curves: Sequence[Curve], settings: Settings) -> list[dict[str, float]]:
    """The predicted loss that the same way of choosing ranks reaches at other sizes, as far as the form can go."""
    points, choose = [], CHOOSERS[settings.allocation]
    for removed in sorted({*_GRID, settings.remove}):
        try:
            ranks = choose(curves, 1.0 - removed, settings.form, settings.rank_multiple)
        except UsageError:  # beyond what the form, or the multiple, can do
            continue
        loss = sum(float(c.tail[rank]) for c, rank in zip(curves, ranks, strict=True) if rank is not None)
        points.append({"removed_ratio": removed, "predicted_loss": loss})
    return points


def write_plots(report: dict[str, Any], folder: pathlib.Path) -> None:
    """`neuronmlp_ranks.png`, `neuronmlp_errors.png` and `neuronmlp_loss.png` in `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    _plot_ranks(report, folder / "neuronmlp_ranks.png")
    _plot_errors(report, folder / "neuronmlp_errors.png")
    _plot_loss(report, folder / "neuronmlp_loss.png")


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, path: pathlib.Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120, metadata={"Software": None})  # no version stamp: a rerun gives the same bytes
    pyplot.close(figure)


def _rows(report: dict[str, Any], projection: str) -> list[dict[str, Any]]:
    return [row for row in report["matrices"] if row["projection"] == projection]


def _plot_ranks(report: dict[str, Any], path: pathlib.Path) -> None:
    removed = report["block"]["removed_ratio"]
    figure, axes = _figure(f"Rank per layer, {removed:.1%} of the MLP parameters removed", "layer", "rank")
    full = max(row["rank"] or 0 for row in report["matrices"])
    dense_height = full * 1.06
    for offset, name in enumerate(PROJECTIONS):
        rows = _rows(report, name)
        ranks = [row["rank"] if row["rank"] is not None else np.nan for row in rows]
        axes.plot([r["layer"] for r in rows], ranks, marker="o", markersize=4, color=_COLOURS[name], label=name)
        dense = [r["layer"] for r in rows if r["rank"] is None]
        axes.scatter(dense, [dense_height * (1 + 0.02 * offset)] * len(dense), marker="s", s=18, color=_COLOURS[name], alpha=0.6)
    if any(row["rank"] is None for row in report["matrices"]):
        axes.axhline(dense_height * 0.99, color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate("kept dense", (0, dense_height), xytext=(0, -11), textcoords="offset points", fontsize=8, color="0.35")
    axes.set_ylim(0, dense_height * 1.12 + 1)
    axes.legend(loc="lower left", frameon=False)
    _save(figure, path)


def _plot_errors(report: dict[str, Any], path: pathlib.Path) -> None:
    figure, axes = _figure("Relative output error per layer: predicted (line), achieved on held-out text (dots)", "layer", "relative error")
    for name in PROJECTIONS:
        rows = [row for row in _rows(report, name) if row["rank"] is not None]
        layers = [row["layer"] for row in rows]
        axes.plot(layers, [row["predicted_error"] for row in rows], color=_COLOURS[name], label=name)
        achieved = [(row["layer"], row["achieved_error"]) for row in rows if row["achieved_error"] is not None]
        axes.scatter([a for a, _ in achieved], [b for _, b in achieved], color=_COLOURS[name], s=20)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _save(figure, path)


def _plot_loss(report: dict[str, Any], path: pathlib.Path) -> None:
    figure, axes = _figure("Predicted loss against size", "MLP parameters removed", "predicted loss, summed over matrices")
    points = report["loss_by_size"]
    axes.plot([p["removed_ratio"] for p in points], [p["predicted_loss"] for p in points], marker="o", markersize=4, color="#0072b2")
    chosen = sum(row["predicted_loss"] for row in report["matrices"])
    axes.scatter([report["block"]["removed_ratio"]], [chosen], color="#d55e00", zorder=3, s=50, label="this checkpoint")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _save(figure, path)
