"""`neuronmlp doctor`: see neuronmlp_plugin/doctor."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.doctor import run as examine

    return examine(args)
