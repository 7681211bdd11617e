"""What the simulated kinds of `neuronmlp bench` ask for on the command line."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Collection

from neuronmlp_plugin.argument_types import path
from nki_kernels.cost.constants import SETS
from nki_kernels.cost.interconnect import COLLECTIVES
from nki_kernels.targets import TARGETS

Write = Callable[[str], None]
say: Write = functools.partial(print, flush=True)  # a line of a table, as soon as it is known


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """A `type` for list arguments: argparse holds `choices` against the default list too, as if it were one
    value.
    """

    def check(value: str) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, found {value!r}")
        return value

    return check


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Target, set of constants."""
    parser.add_argument("--target", choices=TARGETS, default="trn1")
    parser.add_argument(
        "--constants", choices=SETS, default="calibrated", help="set of DMA rates (default %(default)s)"
    )


def add_collectives(parser: argparse.ArgumentParser) -> None:
    """Set of latencies between cores."""
    parser.add_argument(
        "--collectives", choices=COLLECTIVES, default="ring", help="set of latencies (default %(default)s)"
    )


def add_csv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=path, help="append the rows to this file")
