"""`neuronmlp quantize`: the MLPs of a dense or factored folder in int8."""

from __future__ import annotations

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=pathlib.Path, help="a dense Hugging Face folder, or one that `neuronmlp compress` wrote")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write; must not exist yet")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from neuronmlp_plugin.compressor.progress import ProgressBars
    from neuronmlp_plugin.compressor.quantize import quantize_folder

    block = quantize_folder(args.model, args.out, ProgressBars(Console(stderr=True), quiet=args.quiet))
    print(f"{args.out}: MLPs in int8, {block.weight_bytes / 1e6:.1f} MB, {block.bytes_ratio:.1%} of the dense ones in bf16")
    return 0
