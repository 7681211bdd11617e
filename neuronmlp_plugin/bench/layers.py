"""`neuronmlp bench layers`: time to first token and per output token of whole models on 1 to 32 cores, dense
and in every way that their MLPs can be stored. Simulated throughout.
"""

from __future__ import annotations

import argparse

from neuronmlp_plugin.argument_types import positive, share
from neuronmlp_plugin.bench.arguments import add_collectives, add_csv, add_model_arguments, one_of
from neuronmlp_plugin.bench.rows import append_rows
from nki_kernels.cost.models import MODELS

SHOWN = ("Llama-3.2-1B", "Qwen3-4B", "Llama-3.1-8B", "Llama-3.1-70B")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        default=[*SHOWN],
        type=one_of(MODELS),
        metavar="MODEL",
        help=f"of {', '.join(MODELS)} (default: {', '.join(SHOWN)})",
    )
    parser.add_argument(
        "--remove",
        type=share,
        default=0.20,
        metavar="SHARE",
        help="share of the MLP parameters taken away (default %(default)s)",
    )
    parser.add_argument(
        "--tp",
        type=positive,
        nargs="+",
        default=None,
        metavar="CORES",
        help="divisors of heads and channels (default 1 2 4 8 16 32; from 8 for 70B)",
    )
    parser.add_argument(
        "--prompt",
        type=positive,
        default=2048,
        help="tokens of the prefill, and of context in decode (default %(default)s)",
    )
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[1, 16], help="sequences decoded together (default 1 16)"
    )
    add_model_arguments(parser)
    add_collectives(parser)
    add_csv(parser)


def run(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.bench.layer_cases import report, where

    done = report(args)
    if args.csv:
        append_rows(args.csv, (row for item in done for row in item.rows(where(args))))
    return 0
