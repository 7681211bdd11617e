"""`neuronmlp bench docs`: every simulated table, picture and row of docs/, made again in one run. Simulated
throughout.

Tables go between the markers of docs/cost_model.md (`pages`), rows to docs/simulated.csv, pictures to
docs/images. Nothing is written before everything is made.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from neuronmlp_plugin.argument_types import path
from neuronmlp_plugin.bench.arguments import Write
from neuronmlp_plugin.bench.rows import Row, append_rows

if TYPE_CHECKING:
    from neuronmlp_plugin.bench.kernel_cases import Result

PAGE, ROWS, IMAGES = "cost_model.md", "simulated.csv", "images"
BLOCKS = (
    "calibration",
    "kernels",
    "asked",
    "rates",
    "plans",
    "layers ring",
    "layers mesh",
    "int8 MLPs",
    "int8 models",
    "four groups",
)
# What the README says of a chip: folders that four cores serve, in the form that most of their layers have.
FOUR_GROUPS = ("Llama-3.1-8B", "--tp", "4", "--batch", "1", "--form", "groups compact")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=path,
        default=pathlib.Path("docs"),
        help="where page, rows and pictures are (default %(default)s)",
    )


class Made:
    """What has been made so far: blocks by name, rows, and lines told to the user as they come."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[str]] = {}
        self.rows: list[Row] = []
        self.began = time.perf_counter()

    def block(self, name: str) -> Write:
        """A place for the lines of a block."""
        lines = self.blocks.setdefault(name, [])

        def write(line: str) -> None:
            lines.append(line)
            print(f"[{time.perf_counter() - self.began:5.0f} s] {name}: {line}", file=sys.stderr, flush=True)

        return write

    def add(self, rows: Iterable[Row]) -> None:
        self.rows += rows


def _options(module: object, *given: str) -> argparse.Namespace:
    """The options of another kind of bench."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return parser.parse_args(given)


def make(made: Made) -> list[Result]:
    """All blocks and rows; the results of the kernels are given back for the pictures."""
    from neuronmlp_plugin.bench import calibrate, int8, int8_cases, kernels, layer_cases, layers, summary
    from nki_kernels.cost.constants import CALIBRATED

    made.add(calibrate.csv_rows(calibrate.report(CALIBRATED, made.block("calibration")), CALIBRATED))
    options = _options(kernels)
    results = kernels.report(options, made.block("kernels"))
    made.add(kernels.csv_rows(results, options))
    summary.against_what_was_asked(results, made.block("asked"))
    summary.by_rates(made.block("rates"))
    summary.plans(made.block("plans"))
    for name in ("ring", "mesh"):
        options = _options(layers, "--collectives", name)
        done = layer_cases.report(options, made.block(f"layers {name}"))
        made.add(row for item in done for row in item.rows(layer_cases.where(options)))
    made.add(int8_cases.report_mlps(0.20, made.block("int8 MLPs")))
    made.add(int8_cases.report_models(_options(int8), made.block("int8 models")))
    for removed in ("0.10", "0.20", "0.40"):
        options = _options(int8, *FOUR_GROUPS, "--remove", removed)
        made.add(int8_cases.report_models(options, made.block("four groups")))
    return results


def run(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.bench import kernels, pages

    page = args.folder / PAGE
    pages.block_names(page)  # a folder without the page is found out now and not in half an hour
    made = Made()
    results = make(made)
    pages.fill_blocks(page, made.blocks)
    (args.folder / ROWS).unlink(missing_ok=True)
    append_rows(args.folder / ROWS, made.rows)
    kernels.draw(args.folder / IMAGES, results, _options(kernels))
    print(f"{page}, {args.folder / ROWS}: {len(made.blocks)} blocks, {len(made.rows)} rows (simulated)")
    return 0
