"""`neuronmlp quantize`: the MLPs of a dense or factored folder in int8."""

from __future__ import annotations

import argparse
import functools
import pathlib
from typing import TYPE_CHECKING

from neuronmlp_plugin.arguments import positive

if TYPE_CHECKING:
    import torch

    from neuronmlp_plugin.calibration.quality import Judge
    from neuronmlp_plugin.checkpoint.reader import Checkpoint
    from neuronmlp_plugin.compressor.progress import ProgressBars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=pathlib.Path, help="a dense Hugging Face folder, or one that `neuronmlp compress` wrote"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write; must not exist yet")
    parser.add_argument(
        "--dense",
        type=pathlib.Path,
        help="with --text: the dense folder, to measure the quality for the report",
    )
    parser.add_argument("--text", type=pathlib.Path, help="with --dense: held-out text, .txt or .jsonl")
    parser.add_argument(
        "--tokens",
        type=positive,
        default=8192,
        help="how much of the text to use, spread evenly (default %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from neuronmlp_plugin.calibration.text import held_out_windows
    from neuronmlp_plugin.checkpoint.reader import open_dense
    from neuronmlp_plugin.compressor.progress import ProgressBars
    from neuronmlp_plugin.compressor.quantize import quantize_folder
    from neuronmlp_plugin.errors import UsageError
    from neuronmlp_plugin.reporting.folder import REPORT_FILE

    bars = ProgressBars(Console(stderr=True), quiet=args.quiet)
    if (args.dense is None) != (args.text is None):
        raise UsageError(
            "--dense, --text: expected both or neither, found one; quality is measured against the dense folder on a text."
        )
    judge = None
    if args.dense is not None:
        if not (args.model / REPORT_FILE).is_file():
            raise UsageError(
                f"--text: expected a folder with a report to put the quality into, found none in {args.model}; use `evaluate`."
            )
        windows = held_out_windows(args.dense, args.text, args.tokens)
        judge = functools.partial(_judge, windows, open_dense(args.dense), bars)
    block = quantize_folder(args.model, args.out, bars, judge, args.text)
    print(
        f"{args.out}: MLPs in int8, {block.weight_bytes / 1e6:.1f} MB, {block.bytes_ratio:.1%} of the dense ones in bf16"
    )
    return 0


def _judge(windows: torch.Tensor, checkpoint: Checkpoint, bars: ProgressBars) -> Judge:
    from neuronmlp_plugin.calibration.quality import Judge
    from neuronmlp_plugin.calibration.stream import LayerStream

    dense = LayerStream(checkpoint)
    with bars.stage("dense model", dense.num_layers) as tick:
        return Judge(dense, windows, tick)
