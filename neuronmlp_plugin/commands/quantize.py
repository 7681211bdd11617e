"""`neuronmlp quantize`: the MLPs of a dense or factored folder in int8."""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING

from neuronmlp_plugin.argument_types import path, positive
from neuronmlp_plugin.errors import printable

if TYPE_CHECKING:
    import torch

    from neuronmlp_plugin.calibration.quality import Judge
    from neuronmlp_plugin.checkpoint.reader import Checkpoint
    from neuronmlp_plugin.compressor.job import ProgressBars


WINDOW = 1024  # tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=path, help="a dense Hugging Face folder, or one that `neuronmlp compress` wrote"
    )
    parser.add_argument(
        "--out", type=path, required=True, help="folder to write; must not exist yet (required)"
    )
    parser.add_argument(
        "--text",
        type=path,
        help=(
            "calibration text, as for `compress`: the model runs over it, and numbers are rounded so that "
            "the MLPs' outputs there change least; without it each number goes to the nearest of its 255 "
            "steps"
        ),
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=32768,
        help="how much of the text to see, spread evenly (default %(default)s)",
    )
    parser.add_argument(
        "--dense",
        type=path,
        help="with --text: the dense folder; the end of the text, which is then not rounded by, judges the "
        "result against it for the report",
    )
    parser.add_argument(
        "--judge-tokens",
        type=positive,
        default=8192,
        help="kept apart from the text's end to judge (default %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from neuronmlp_plugin.checkpoint.reader import Checkpoint, open_dense
    from neuronmlp_plugin.compressor.int8_folder import quantize_folder
    from neuronmlp_plugin.compressor.job import ProgressBars
    from neuronmlp_plugin.compressor.origin import check_made_from
    from neuronmlp_plugin.errors import UsageError
    from neuronmlp_plugin.reporting.folder import REPORT_FILE

    bars = ProgressBars(Console(stderr=True), quiet=args.quiet)
    if args.dense is not None and args.text is None:
        raise UsageError("--dense: expected --text to judge on beside it, found none; name a text.")
    if args.dense is not None and not (args.model / REPORT_FILE).is_file():
        raise UsageError(
            f"--dense: expected a folder with a report to put the quality into, found none in {args.model}; "
            "use `evaluate`."
        )
    dense = None if args.dense is None else open_dense(args.dense)
    if dense is not None:
        check_made_from(Checkpoint(args.model), dense)
    windows, judge = None, None
    if args.text is not None:
        windows, judged = _windows(args)
        if dense is not None:
            judge = functools.partial(_judge, judged, dense, bars)
    block = quantize_folder(args.model, args.out, bars, windows, judge, args.text)
    print(
        f"{printable(str(args.out))}: MLPs in int8, {block.weight_bytes / 1e6:.1f} MB, "
        f"{block.bytes_ratio:.1%} of the dense ones in bf16"
    )
    return 0


def _windows(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to round by and windows to judge on, of one text."""
    from neuronmlp_plugin.calibration.text import (
        hold_out,
        load_tokenizer,
        read_windows,
        spread,
        within_positions,
    )
    from neuronmlp_plugin.checkpoint.reader import Checkpoint
    from neuronmlp_plugin.errors import CalibrationError

    base = Checkpoint(args.model)
    vocabulary, window = base.shapes()["model.embed_tokens.weight"][0], within_positions(WINDOW, base.config)
    wanted = args.tokens + args.judge_tokens
    found = read_windows(args.text, load_tokenizer(args.model), window, wanted, vocabulary)
    pool, judged = hold_out(found, args.judge_tokens if args.dense is not None else 0)
    if args.dense is not None and not len(judged):
        raise CalibrationError(
            f"{args.text}: expected at least {8 * window:,} tokens, so that some can judge, found fewer; "
            "give more."
        )
    return spread(pool, args.tokens // window), judged


def _judge(windows: torch.Tensor, checkpoint: Checkpoint, bars: ProgressBars) -> Judge:
    from neuronmlp_plugin.calibration.layer_stream import LayerStream, best_device
    from neuronmlp_plugin.calibration.quality import Judge

    dense = LayerStream(checkpoint, device=best_device())
    with bars.stage("dense model", dense.num_layers) as tick:
        return Judge(dense, windows, tick)
