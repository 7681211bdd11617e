"""`neuronmlp bench int8`: int8 weights against bf16 ones, one MLP and whole models. Simulated throughout."""

from __future__ import annotations

import argparse

from neuronmlp_plugin.bench import layers
from neuronmlp_plugin.bench.rows import append_rows
from nki_kernels.cost.mlp_forms import FORMS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    layers.add_arguments(parser)
    parser.add_argument("--whole-models", action="store_true", help="whole models alone, no single MLPs")
    parser.add_argument("--form", choices=FORMS, help="of whole models (default: the fastest in bf16)")


def run(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.bench.int8_cases import report_mlps, report_models

    rows = [] if args.whole_models else report_mlps(args.remove)
    rows += report_models(args)
    if args.csv:
        append_rows(args.csv, rows)
    return 0
