"""The files of a report: JSON in, page and card out. The page is one file that needs nothing else: no script,
no request, everything that is not ours escaped.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jinja2

from neuronmlp_plugin.checkpoint.writer import save_json, save_text
from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.reporting import view
from neuronmlp_plugin.reporting.card import render_card
from neuronmlp_plugin.reporting.figures import (
    Plot,
    agreement_plot,
    error_plot,
    history_plot,
    loss_plot,
    rank_plot,
    spectrum_plots,
    to_svg,
)

REPORT_FILE = "neuronmlp_report.json"
PAGE_FILE = "neuronmlp_report.html"
CARD_FILE = "README.md"


def read_report(folder: pathlib.Path) -> dict[str, Any]:
    """The report that a compression left in `folder`. Raises CheckpointError where there is none."""
    path = folder / REPORT_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected the report that `neuronmlp compress` writes, found: {error}."
        ) from error
    if not isinstance(report, dict) or not (report.get("block") and report.get("matrices")):
        raise CheckpointError(
            f"{path}: expected a report with `block` and `matrices`, found another JSON file; compress again."
        )
    return report


def _rendered(render: Callable[[dict[str, Any]], str], report: dict[str, Any], folder: pathlib.Path) -> str:
    """Refuses a report in which something is missing or of another kind: only a JSON edited by hand is like
    that.
    """
    try:
        return render(report)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{folder / REPORT_FILE}: expected a whole report, found one that cannot be shown ({reason}); "
            "compress again."
        ) from error


def write_report(folder: pathlib.Path, report: dict[str, Any]) -> None:
    """All three files."""
    save_json(folder / REPORT_FILE, report)
    write_page(folder, report)
    write_card(folder, report)


def write_page(folder: pathlib.Path, report: dict[str, Any]) -> pathlib.Path:
    """`neuronmlp_report.html`, whole or not at all."""
    path = folder / PAGE_FILE
    save_text(path, _rendered(render_page, report, folder))
    return path


def write_card(folder: pathlib.Path, report: dict[str, Any]) -> pathlib.Path:
    """`README.md`, whole or not at all."""
    path = folder / CARD_FILE
    save_text(path, _rendered(render_card, report, folder))
    return path


def render_page(report: dict[str, Any]) -> str:
    """The page of a report (the JSON that `compress` writes, of any age: keys added later may be missing).

    `quality` is taken for the quality of the weights in the folder: a stage that changes them must measure it
    again.
    """
    template = _environment().get_template("page.html")
    return template.render(report=report, view=view, **_plots(report), **_refined(report.get("refinement")))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = to_svg
    return environment


def _plots(report: dict[str, Any]) -> dict[str, list[Plot]]:
    """The plots of each section; those that this report has no numbers for are left out."""
    return {
        "size_plots": _there(rank_plot(report), loss_plot(report)),
        "error_plots": _there(error_plot(report), agreement_plot(report)),
        "spectrum_plots": spectrum_plots(report),
    }


def _refined(refinement: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "refinement": refinement,
        "refinement_plots": _there(history_plot(refinement)) if refinement else [],
    }


def _there(*plots: Plot | None) -> list[Plot]:
    return [plot for plot in plots if plot is not None]
