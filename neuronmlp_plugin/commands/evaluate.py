"""`neuronmlp evaluate`: a checkpoint, in the form that is served, against its dense model on text that neither was made from."""

from __future__ import annotations

import argparse
import json
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=pathlib.Path, help="the checkpoint to judge, or the dense folder when --factors is given")
    parser.add_argument("--dense", type=pathlib.Path, required=True, help="the dense folder it was made from")
    parser.add_argument("--text", type=pathlib.Path, required=True, help="held-out text: .txt or .jsonl")
    parser.add_argument("--factors", type=pathlib.Path, help="a factor file to lay over MODEL")
    parser.add_argument("--tokens", type=int, default=32768, help="how much of the text to use, spread evenly (default %(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="tokens per window (default %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="arithmetic of both models (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from transformers import AutoTokenizer

    from neuronmlp_plugin.calibration.quality import compare
    from neuronmlp_plugin.calibration.stream import LayerStream
    from neuronmlp_plugin.calibration.text import read_documents, spread, token_windows
    from neuronmlp_plugin.checkpoint.loader import open_folder
    from neuronmlp_plugin.compressor.progress import ProgressBars

    dtype = getattr(torch, args.dtype)
    folders = (open_folder(args.dense), open_folder(args.model, args.factors))
    reference, candidate = (LayerStream(*folder, dtype=dtype) for folder in folders)
    tokenizer = AutoTokenizer.from_pretrained(args.dense, trust_remote_code=False)
    windows = spread(token_windows(read_documents(args.text, tokenizer), tokenizer, args.window), args.tokens // args.window)
    with ProgressBars(Console(stderr=True), quiet=args.json).stage("layers", reference.num_layers + candidate.num_layers) as tick:
        quality = compare(reference, candidate, windows, tick)
    if args.json:
        print(json.dumps(quality.to_json(), indent=2))
        return 0
    print(f"tokens      {quality.num_tokens:,}")
    against = f"{quality.candidate_perplexity:.3f} against {quality.reference_perplexity:.3f} dense"
    print(f"perplexity  {against} (x {quality.perplexity_ratio:.4f})")
    print(f"KL          {quality.kl_divergence:.4f} nats per token, KL(dense || compressed)")
    print(f"top-1       {quality.top1_agreement:.2%} the same token")
    return 0
