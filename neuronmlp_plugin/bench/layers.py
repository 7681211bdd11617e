"""`neuronmlp bench layers`: time to first token and per output token of whole models, with Amdahl's bound.
Simulated throughout.
"""

from __future__ import annotations

import argparse

from neuronmlp_plugin.arguments import positive, share
from neuronmlp_plugin.bench.arguments import add_csv, add_model_arguments, one_of
from nki_kernels.cost.models import MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        default=[*MODELS],
        type=one_of(MODELS),
        metavar="MODEL",
        help=f"of {', '.join(MODELS)} (default: all)",
    )
    parser.add_argument(
        "--remove",
        type=share,
        default=0.20,
        metavar="SHARE",
        help="share of the MLP parameters taken away (default %(default)s)",
    )
    parser.add_argument("--form", choices=("uv", "compact"), default="uv")
    parser.add_argument("--tp", type=positive, nargs="+", default=[1, 8, 32], help="cores (default 1 8 32)")
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
    add_csv(parser)


def run(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.bench.layer_cases import report

    return report(args)
