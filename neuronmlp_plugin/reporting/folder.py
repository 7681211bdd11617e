"""The files of a report: JSON in, page and card out."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

from neuronmlp_plugin.checkpoint.writer import save_json, save_text
from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.reporting.card import render_card
from neuronmlp_plugin.reporting.page import render_page

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
