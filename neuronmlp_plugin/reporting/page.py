"""The report as one HTML page that needs nothing else: no script, no request, everything that is not ours
escaped.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jinja2

from neuronmlp_plugin.reporting import view
from neuronmlp_plugin.reporting.figures import (
    Plot,
    agreement_plot,
    error_plot,
    history_plot,
    loss_plot,
    rank_plot,
    spectrum_plots,
)
from neuronmlp_plugin.reporting.svg import to_svg


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
