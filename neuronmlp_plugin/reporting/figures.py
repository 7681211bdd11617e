"""The plots of a report as matplotlib figures: numbers in, a figure and its words out. No files, no light or
dark: as SVG a figure can stand inside a page, with the same bytes every time, colours from the style sheet
and words for a screen reader.
"""

from __future__ import annotations

import dataclasses
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from neuronmlp_plugin.models.factors import PROJECTIONS
from neuronmlp_plugin.reporting.run_report import Report, Row

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def to_svg(plot: Plot) -> Markup:
    """The `<svg>` element of a plot; text stays text, in the page's font."""
    root = ET.fromstring(_drawn(plot))
    for parent in list(root.iter()):
        for child in list(parent):
            # A style inside would rule the whole page.
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    _drop_unused_ids(root)
    for size in ("width", "height"):  # the style sheet decides; the view box keeps the shape
        root.attrib.pop(size)
    root.set("role", "img")
    root.set("aria-label", f"{plot.title}. {plot.alt}")
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return Markup(_themed(ET.tostring(root, encoding="unicode")))  # ElementTree has escaped all text


def _drawn(plot: Plot) -> str:
    import matplotlib

    # Names of clip paths and markers come from the salt: one a plot, since they share a page.
    settings = {**STYLE, "svg.fonttype": "none", "svg.hashsalt": plot.name}
    target = io.StringIO()
    with matplotlib.rc_context(settings):
        plot.figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return target.getvalue()


def _drop_unused_ids(root: ET.Element) -> None:
    """matplotlib numbers every group alike in every figure; only what is referred to may keep its name."""
    used = set(re.findall(r"#(\w+)", ET.tostring(root, encoding="unicode")))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _themed(text: str) -> str:
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for stand_in, variable in CSS_COLOURS.items():
        text = text.replace(stand_in, f"var({variable})")
    return re.sub(r"\s*\n\s*", " ", text)


# Stand-ins that `to_svg` turns into variables of the page's style sheet, so that one drawing serves the light
# and the dark scheme.
INK, GRID, MARK = "#010101", "#020202", "#030303"
_COLOURS = {"gate_proj": "#040404", "up_proj": "#050505", "down_proj": "#060606"}
CSS_COLOURS = {
    INK: "--ink",
    GRID: "--line",
    MARK: "--mark",
    "#040404": "--gate",
    "#050505": "--up",
    "#060606": "--down",
}
# Nobody has to tell colours apart: each projection has a marker and a dash of its own.
_MARKERS = {"gate_proj": "o", "up_proj": "s", "down_proj": "^"}
_DASHES = {"gate_proj": "-", "up_proj": (0, (4, 1.5)), "down_proj": (0, (1.2, 1.2))}
# First layer to last; both ends and all between keep a contrast above 3 on white and on the dark page.
_DEPTH = ("#2f7fd6", "#d2552b")
# Ticks of the spectra, which are cut off below.
_SHARES = {1.0: "100%", 0.1: "10%", 0.01: "1%", 1e-3: "0.1%", 1e-4: "0.01%"}

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": GRID,
    "lines.markersize": 4,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure with its heading and with what it shows in one or two sentences, for those who do not see
    it.
    """

    name: str
    title: str
    figure: Any
    alt: str


def rank_plot(report: Report) -> Plot | None:
    """Rank by layer; a matrix that stayed dense stands above the highest possible rank. None where nothing
    was cut.
    """
    cut = [row for row in report.matrices if row["rank"] is not None]
    if not cut:
        return None
    full = report.spectra["ranks"][-1] if report.spectra else max(row["rank"] for row in cut)
    figure, axes = _axes("layer", "rank")
    for offset, name in enumerate(PROJECTIONS):
        _line(axes, name, ((r["layer"], r["rank"]) for r in _of(report.matrices, name)))
        dense = [row["layer"] for row in _of(report.matrices, name) if row["rank"] is None]
        # Above every rank, a line for each projection: none hides another, and nothing reads as a rank.
        axes.scatter(
            dense,
            [full * (1.06 + 0.05 * offset)] * len(dense),
            s=16,
            marker=_MARKERS[name],
            color=_COLOURS[name],
            zorder=3,
        )
    kept = len(report.matrices) - len(cut)
    if kept:
        axes.axhline(full * 1.01, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, full * (1.2 if kept else 1.05))
    ticks = [tick for tick in axes.get_yticks() if tick < full * 0.96]
    axes.set_yticks(
        [*ticks, full * 1.11] if kept else ticks, [*(f"{t:.0f}" for t in ticks), "dense"] if kept else None
    )
    _legend(figure, axes)
    low, high = min(cut, key=lambda r: r["rank"]), max(cut, key=lambda r: r["rank"])
    stayed = "1 matrix" if kept == 1 else f"{kept} matrices"
    alt = (
        f"Lowest rank {low['rank']} ({_name(low)}), highest {high['rank']} ({_name(high)}); {stayed} stayed "
        "dense."
    )
    return Plot("ranks", "Rank of every matrix", figure, alt)


def error_plot(report: Report) -> Plot | None:
    """Achieved relative output error by layer. None where no text was kept to measure it on."""
    measured = _measured(report)
    if not measured:
        return None
    figure, axes = _axes("layer", "relative output error, held-out")
    for name in PROJECTIONS:
        _line(
            axes,
            name,
            (
                (r["layer"], r["achieved_error"] if r["rank"] is not None else None)
                for r in _of(report.matrices, name)
            ),
        )
    axes.set_ylim(bottom=0)
    _legend(figure, axes)
    worst = max(measured, key=lambda r: r["achieved_error"])
    alt = (
        f"Largest error {worst['achieved_error']:.3f}, of {_name(worst)}; matrices that stayed dense have "
        "none."
    )
    return Plot("errors", "Error of every matrix", figure, alt)


def agreement_plot(report: Report) -> Plot | None:
    """Predicted against achieved error, with the diagonal on which a prediction is right."""
    measured = _measured(report)
    if not measured:
        return None
    figure, axes = _axes("predicted on calibration text", "achieved on held-out text")
    top = 1.05 * max(max(row["predicted_error"], row["achieved_error"]) for row in measured) or 1.0
    axes.plot([0, top], [0, top], color=INK, linewidth=0.8, linestyle=":")
    for name in PROJECTIONS:
        points = [(row["predicted_error"], row["achieved_error"]) for row in _of(measured, name)]
        if points:
            axes.scatter(
                *zip(*points, strict=True),
                s=16,
                marker=_MARKERS[name],
                color=_COLOURS[name],
                label=name,
                zorder=3,
            )
    axes.set(xlim=(0, top), ylim=(0, top))
    _legend(figure, axes)
    ratios = sorted(
        row["achieved_error"] / row["predicted_error"] for row in measured if row["predicted_error"] > 0
    )
    between = (
        f" from {ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratios[len(ratios) // 2]:.2f}"
        if ratios
        else " unknown"
    )
    return Plot(
        "agreement", "Error: predicted against achieved", figure, f"Achieved over predicted error:{between}."
    )


def loss_plot(report: Report) -> Plot | None:
    """Predicted loss at other sizes, and this checkpoint among them."""
    points = report.loss_by_size
    if not points:
        return None
    figure, axes = _axes("MLP parameters removed", "predicted loss, all matrices")
    sizes, losses = [p["removed_ratio"] for p in points], [p["predicted_loss"] for p in points]
    axes.plot(sizes, losses, "o-", color=_COLOURS["gate_proj"], label="ranks from predicted losses")
    here, loss = report.removed_ratio, sum(row["predicted_loss"] for row in report.matrices)
    axes.scatter([here], [loss], s=60, marker="D", color=MARK, zorder=3, label="this checkpoint")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_ylim(bottom=0)
    _legend(figure, axes)
    last = points[-1]
    elsewhere = f"At {last['removed_ratio']:.0%} removed it would be {last['predicted_loss']:.3g}."
    alt = f"This checkpoint: {loss:.3g} at {here:.1%} removed. {elsewhere}"
    return Plot("loss", "Predicted loss against size", figure, alt)


def spectrum_plots(report: Report) -> list[Plot]:
    """One plot a projection: what every layer would lose at every rank, and the rank that it got."""
    spectra = report.spectra
    return [_spectrum(report, spectra, name) for name in PROJECTIONS] if spectra else []


def _spectrum(report: Report, spectra: dict[str, Any], name: str) -> Plot:
    ranks, layers = spectra["ranks"], spectra["layers"]
    figure, axes = _axes("rank", "share of output energy lost", width=3.7)
    colours, named = _depth_colours(len(layers)), {0, len(layers) // 2, len(layers) - 1}
    for index, layer in enumerate(layers):
        # Nothing is lost at full rank, and a logarithm has no place for it.
        shown = [share or float("nan") for share in layer[name]]
        axes.plot(
            ranks,
            shown,
            color=colours[index],
            linewidth=1,
            label=f"layer {index}" if index in named else None,
        )
    chosen = [
        row for row in _of(report.matrices, name) if row["rank"] is not None and row["predicted_error"] > 0
    ]
    dots = {
        "color": [colours[row["layer"]] for row in chosen],
        "edgecolor": INK,
        "linewidth": 0.6,
        "s": 14,
        "zorder": 3,
    }
    axes.scatter([row["rank"] for row in chosen], [row["predicted_error"] ** 2 for row in chosen], **dots)
    axes.set(yscale="log", ylim=(min(_SHARES), 1.3), xlim=(0, ranks[-1]))
    axes.set_yticks(list(_SHARES), _SHARES.values())
    axes.minorticks_off()
    _legend(figure, axes)
    middle = len(ranks) // 2
    lost = sorted(layer[name][middle] for layer in layers)
    alt = (
        f"At rank {ranks[middle]} of {ranks[-1]} a layer would lose from {lost[0]:.2%} to {lost[-1]:.2%} of "
        "its output energy."
    )
    return Plot(f"spectrum-{name}", name, figure, alt)


def history_plot(refinement: dict[str, Any]) -> Plot | None:
    """Training loss of the refinement over the tokens that it saw. None for fewer than two points."""
    from matplotlib.ticker import EngFormatter

    history = refinement.get("history") or []
    if len(history) < 2:
        return None
    figure, axes = _axes("tokens", "loss, nats a token")
    axes.plot(
        [h["tokens"] for h in history],
        [h["loss"] for h in history],
        color=_COLOURS["gate_proj"],
        linewidth=1.5,
    )
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.locator_params(axis="x", nbins=6)
    # Steps see different text: one of them says little.
    tenth, losses = max(1, len(history) // 10), [h["loss"] for h in history]
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    alt = (
        f"Mean of the first and last tenth: {first:.4g} and {last:.4g}, over {history[-1]['tokens']:,} "
        "tokens."
    )
    return Plot("history", "Loss during refinement", figure, alt)


def _axes(x: str, y: str, width: float = 5.0) -> tuple[Any, Any]:
    """A figure narrow enough that its text stays readable when a phone shrinks it to its own width."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        # By itself the layout leaves no room for a number under the right end of the axis.
        figure = Figure(figsize=(width, 3.7), layout=ConstrainedLayoutEngine(rect=(0, 0, 0.96, 1)))
        axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.set_axisbelow(True)
    return figure, axes


def _line(axes: Any, name: str, points: Iterable[tuple[float, float | None]]) -> None:
    """Points by layer, joined where neighbours have a value."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    xs, ys = zip(*points, strict=True)
    numbers = [float("nan") if y is None else y for y in ys]
    axes.plot(
        xs,
        numbers,
        marker=_MARKERS[name],
        linestyle=_DASHES[name],
        linewidth=1.3,
        color=_COLOURS[name],
        label=name,
    )


def _legend(figure: Any, axes: Any) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        labelcolor=INK,
        fontsize=STYLE["font.size"],
        handlelength=1.5,
        columnspacing=1.2,
    )


def _of(rows: list[Row], projection: str) -> list[Row]:
    return [row for row in rows if row["projection"] == projection]


def _measured(report: Report) -> list[Row]:
    return [row for row in report.matrices if row["rank"] is not None and row["achieved_error"] is not None]


def _name(row: Row) -> str:
    return f"{row['projection']} of layer {row['layer']}"


def _depth_colours(count: int) -> list[Any]:
    from matplotlib.colors import LinearSegmentedColormap

    return list(
        LinearSegmentedColormap.from_list("depth", _DEPTH)([i / max(1, count - 1) for i in range(count)])
    )
