"""`neuronmlp bench calibrate`: the cost model against every published latency, with the error of each.
Simulated beside published.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from neuronmlp_plugin.bench.arguments import Write, add_csv, say
from neuronmlp_plugin.bench.rows import Row, append_rows
from nki_kernels.cost.constants import SETS, Constants

if TYPE_CHECKING:
    from nki_kernels.cost.calibration import Judged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--constants", choices=SETS, default="calibrated", help="set of DMA rates (default %(default)s)"
    )
    add_csv(parser)


def _line(judged: Judged) -> str:
    row = judged.row
    digits = 1 if row.unit == "us" else 2
    predicted = "-" if judged.simulated is None else f"{judged.simulated:.{digits}f}"
    error = "-" if judged.error is None else f"{judged.error:+.1%}"
    promise = "-" if row.tolerance is None else f"{row.tolerance:.0%}{'' if judged.holds else ' BROKEN'}"
    values = f"{row.published:>12.{digits}f}{predicted:>12} {row.unit:<4}{error:>8}{promise:>8}"
    return f"{row.name:<48}{values}  {row.role}; {row.source}"


def heading(constants: Constants) -> str:
    """What the lines are about."""
    head = f"constants: {constants.name} ({constants.source}; {constants.fitted} fitted)"
    return (
        f"{head}\n{'one NeuronCore, bf16':<48}{'published':>12}{'simulated':>12} "
        f"{'':<4}{'error':>8}{'within':>8}  role; source"
    )


def run(args: argparse.Namespace) -> int:
    """0 if every promise of the chosen set holds; only the calibrated set makes any."""
    constants = SETS[args.constants]
    judged = report(constants)
    if args.csv:
        append_rows(args.csv, csv_rows(judged, constants))
    promised = constants.name == "calibrated"
    return 0 if not promised or all(item.holds for item in judged) else 1


def report(constants: Constants, write: Write = say) -> list[Judged]:
    """All rows, a line each as it is predicted."""
    from nki_kernels.cost import calibration

    write(heading(constants))
    judged = []
    for item in calibration.judge(calibration.published_rows(), constants):
        write(_line(item))
        judged.append(item)
    return judged


def csv_rows(judged: Iterable[Judged], constants: Constants) -> Iterator[Row]:
    """One row for each prediction."""
    for item in judged:
        if item.simulated is not None:
            metric = "simulated_us" if item.row.unit == "us" else "hbm_gib"
            name = f"calibrate {item.row.name}"
            yield Row(name, metric, item.row.unit, item.simulated, "simulated", f"constants {constants.name}")
