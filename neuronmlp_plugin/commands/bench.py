"""`neuronmlp bench`: `decode` and `serve` are measured here, now, against the first model named; the others
are simulated, all but `tune --measure`.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from neuronmlp_plugin.arguments import positive
from neuronmlp_plugin.bench.folders import named_folders
from neuronmlp_plugin.commands import bench_serve
from neuronmlp_plugin.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    decode = kinds.add_parser(
        "decode", help="decode throughput in vLLM on this machine, models interleaved (measured)"
    )
    decode.add_argument(
        "models",
        nargs="+",
        metavar="NAME=FOLDER",
        help="checkpoints; the first is what the others are compared with",
    )
    decode.add_argument(
        "--batch", type=positive, nargs="+", default=[1, 8], help="sequences decoded together (default 1 8)"
    )
    decode.add_argument("--new-tokens", type=positive, default=64)
    decode.add_argument(
        "--rounds", type=positive, default=5, help="how often every model is timed (default %(default)s)"
    )
    decode.add_argument("--dtype", default="float32", help="as for `vllm serve` (default %(default)s)")
    decode.add_argument("--csv", type=pathlib.Path, help="append the rows to this file")
    decode.set_defaults(run_kind=_decode)
    bench_serve.add_kinds(kinds)
    _add_simulated(kinds)


def _add_simulated(kinds: Any) -> None:
    """The kinds that ask the cost model of `nki_kernels`."""
    from neuronmlp_plugin.bench import calibrate, docs, int8, kernels, layers, tune

    described = {
        "calibrate": (calibrate, "the cost model against every published latency (simulated)"),
        "kernels": (kernels, "our kernels, their bounds and the published algorithms (simulated)"),
        "layers": (layers, "time to first token and per output token of whole models (simulated)"),
        "int8": (int8, "int8 weights against bf16 ones, one MLP and whole models (simulated)"),
        "tune": (tune, "search tile plans for a file of your own (simulated, or measured on a device)"),
        "docs": (docs, "make every simulated table, picture and row of docs/ again (simulated)"),
    }
    for name, (module, text) in described.items():
        parser = kinds.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(parser)
        parser.set_defaults(run_kind=module.run)


def run(args: argparse.Namespace) -> int:
    status: int = args.run_kind(args)
    return status


def _decode(args: argparse.Namespace) -> int:
    from rich.console import Console

    from neuronmlp_plugin.bench.decode import measure_decode
    from neuronmlp_plugin.bench.rows import Row, append_rows
    from neuronmlp_plugin.compressor.job import ProgressBars

    folders = named_folders("decode", args.models)
    if args.new_tokens < 2:
        raise UsageError(
            "--new-tokens: expected at least 2 (the first one belongs to the prefill), found "
            f"{args.new_tokens}."
        )
    total = args.rounds * len(folders) * len(args.batch)
    with ProgressBars(Console(stderr=True)).stage("timing", total) as tick:
        results = measure_decode(
            folders, args.batch, new_tokens=args.new_tokens, rounds=args.rounds, dtype=args.dtype, tick=tick
        )
    print(
        f"{'model':<16}{'batch':>6}{'tokens/s':>10}{'speed-up':>10}{'ideal':>8}"
        f"{'share of the ideal gain':>25}   (measured, {args.dtype})"
    )
    for r in results:
        share = f"{r.share_of_ideal:.0%}" if r.ideal > 1 else "-"
        print(
            f"{r.model:<16}{r.batch:>6}{r.tokens_per_second:>10.1f}{r.speedup:>10.3f}"
            f"{r.ideal:>8.3f}{share:>25}"
        )
    if args.csv:
        metrics = (("tokens_per_second", "1/s"), ("speedup", "ratio"), ("ideal", "ratio"))
        rows = [
            Row(f"decode {r.model} batch={r.batch}", m, unit, getattr(r, m), "measured")
            for r in results
            for m, unit in metrics
        ]
        append_rows(args.csv, rows)
    return 0
