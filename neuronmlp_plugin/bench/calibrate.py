"""`neuronmlp bench calibrate`: the cost model against every published latency, with the error of each.
Simulated beside published.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from neuronmlp_plugin.bench.arguments import add_csv
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
    predicted = "-" if judged.simulated_us is None else f"{judged.simulated_us:12.1f}"
    error = "-" if judged.error is None else f"{judged.error:+.1%}"
    promise = "-" if row.tolerance is None else f"{row.tolerance:.0%}{'' if judged.holds else ' BROKEN'}"
    return f"{row.name:<60}{row.published_us:>12.1f}{predicted:>14}{error:>9}{promise:>8}  {row.role}; {row.source}"


def report(judged: list[Judged], constants: Constants) -> str:
    """The table, as text."""
    head = f"constants: {constants.name} ({constants.source}; {constants.fitted} fitted)"
    names = f"{'one NeuronCore, bf16':<60}{'published_us':>12}{'simulated_us':>14}{'error':>9}{'within':>8}  role; source"
    return "\n".join([head, names, *map(_line, judged)])


def run(args: argparse.Namespace) -> int:
    """0 if every promise of the chosen set holds; only the calibrated set makes any."""
    from nki_kernels.cost.calibration import judge, published_rows

    constants = SETS[args.constants]
    judged = judge(published_rows(), constants)
    print(report(judged, constants))
    if args.csv:
        predicted = [(item.row, item.simulated_us) for item in judged if item.simulated_us is not None]
        target = f"constants {constants.name}"
        rows = [
            Row(f"calibrate {row.name}", "simulated_us", "us", value, "simulated", target)
            for row, value in predicted
        ]
        append_rows(args.csv, rows)
    promised = constants.name == "calibrated"
    return 0 if not promised or all(item.holds for item in judged) else 1
