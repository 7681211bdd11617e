"""`neuronmlp evaluate`: a checkpoint, in the form that is served, against its dense model on text that
neither was made from.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import TYPE_CHECKING

from neuronmlp_plugin.argument_types import path, positive
from neuronmlp_plugin.errors import printable

if TYPE_CHECKING:
    from neuronmlp_plugin.calibration.layer_stream import LayerStream
    from neuronmlp_plugin.calibration.quality import Quality
    from neuronmlp_plugin.checkpoint.reader import Checkpoint, FactorFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=path,
        nargs="+",
        help="what to judge (the dense model runs once for all), or the dense folder when --factors is given",
    )
    parser.add_argument(
        "--dense", type=path, required=True, help="the dense folder it was made from (required)"
    )
    parser.add_argument(
        "--text", type=path, required=True, help="held-out text, as for `compress` (required)"
    )
    parser.add_argument("--factors", type=path, help="a factor file to lay over MODEL")
    parser.add_argument(
        "--tokens",
        type=positive,
        default=32768,
        help="how much of the text to use, spread evenly (default %(default)s)",
    )
    parser.add_argument(
        "--window", type=positive, default=1024, help="tokens per window (default %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="arithmetic of both models (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from neuronmlp_plugin.calibration.quality import Judge
    from neuronmlp_plugin.calibration.text import check_positions, held_out_windows
    from neuronmlp_plugin.checkpoint.loader import open_folder
    from neuronmlp_plugin.checkpoint.reader import open_dense
    from neuronmlp_plugin.compressor.job import ProgressBars
    from neuronmlp_plugin.errors import UsageError

    if args.factors is not None and len(args.model) > 1:
        raise UsageError(
            "--factors: expected one MODEL to lay the file over, found several; judge them one at a time."
        )
    dense = open_dense(args.dense)
    check_positions(args.window, dense.config)
    opened = [open_folder(model, args.factors) for model in args.model]
    for checkpoint, _ in opened:
        expected, found = (each.config.get("vocab_size") for each in (dense, checkpoint))
        if found != expected:
            raise UsageError(
                f"{checkpoint.folder}: expected the vocabulary of --dense, {expected}, found {found}; name "
                "its own."
            )
        _tell_of_another(checkpoint, dense)
    reference, *candidates = (_stream(args, *each) for each in [(dense, None), *opened])
    vocabulary = dense.shapes()["model.embed_tokens.weight"][0]
    windows = held_out_windows(args.dense, args.text, args.tokens, args.window, vocabulary)
    with ProgressBars(Console(stderr=True), quiet=args.json).stage(
        "layers", reference.num_layers * (1 + len(candidates))
    ) as tick:
        judge = Judge(reference, windows, tick)
        found = [judge.compare(candidate, tick) for candidate in candidates]
    if args.json:
        rows = [quality.to_json() for quality in found]
        print(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2))
        return 0
    for folder, quality in zip(args.model, found, strict=True):
        _print(folder, quality)
    return 0


def _tell_of_another(checkpoint: Checkpoint, dense: Checkpoint) -> None:
    """Two models may be compared that have nothing to do with each other, but not in silence."""
    from neuronmlp_plugin.compressor.origin import other_tensor

    other = other_tensor(checkpoint, dense)
    if other is not None:
        print(
            f"neuronmlp evaluate: {printable(str(checkpoint.folder))} was not made from "
            f"{printable(str(dense.folder))}, whose {other} is another: the numbers are of two models.",
            file=sys.stderr,
        )


def _stream(args: argparse.Namespace, checkpoint: Checkpoint, factors: FactorFile | None) -> LayerStream:
    import torch

    from neuronmlp_plugin.calibration.layer_stream import LayerStream, best_device

    return LayerStream(checkpoint, factors, dtype=getattr(torch, args.dtype), device=best_device())


def _print(folder: pathlib.Path, quality: Quality) -> None:
    print(printable(str(folder)))
    print(f"  tokens      {quality.num_tokens:,}")
    print(f"  perplexity  {quality.perplexities} ({quality.written('perplexity_ratio')})")
    print(f"  KL          {quality.written('kl_divergence')} nats a token, KL(dense || compressed)")
    print(f"  top-1       {quality.written('top1_agreement')} of the positions: the same most likely token")
