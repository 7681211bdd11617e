"""`neuronmlp report`: the HTML page once more, from the numbers in the folder."""

from __future__ import annotations

import argparse

from neuronmlp_plugin.argument_types import path
from neuronmlp_plugin.errors import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=path,
        help="folder with neuronmlp_report.json (MODEL/neuronmlp for a factor file)",
    )
    parser.add_argument(
        "--card",
        action="store_true",
        help="write the model card (README.md) again as well, over what it says now",
    )


def run(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.reporting.folder import read_report, write_card, write_page

    report = read_report(args.folder)
    print(printable(str(write_page(args.folder, report))))
    if args.card:
        print(printable(str(write_card(args.folder, report))))
    return 0
