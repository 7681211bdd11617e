"""`neuronmlp bench`: `decode` and `serve` are measured here, now, against the first model named; the others
are simulated, all but `tune --measure`.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from neuronmlp_plugin.argument_types import path, positive
from neuronmlp_plugin.bench.engines import named_folders
from neuronmlp_plugin.errors import UsageError


def add_kinds(kinds: Any) -> None:
    _add_serve(
        kinds.add_parser(
            "serve", help="time to first token and decoding on this machine, models in turns (measured)"
        )
    )
    _add_mlp(kinds.add_parser("mlp", help="one MLP on this CPU, ours against vLLM's dense one (measured)"))
    rivals = kinds.add_parser("rivals", help="the dense model as int8 for vLLM and as Q8_0 for llama.cpp")
    rivals.add_argument("dense", type=path)
    rivals.add_argument("--w8a8", type=path, metavar="FOLDER", help="write compressed-tensors int8 here")
    rivals.add_argument("--gguf", type=path, metavar="FILE", help="write Q8_0 here (needs pip install gguf)")
    rivals.set_defaults(run_kind=_rivals)


def _add_serve(serve: argparse.ArgumentParser) -> None:
    what = "checkpoints, or .gguf files for llama-cpp-python; the first is what the others are compared with"
    serve.add_argument("models", nargs="+", metavar="NAME=FOLDER", help=what)
    serve.add_argument(
        "--first", type=positive, nargs="*", default=[128, 1024], help="tokens of prompt (128 1024)"
    )
    serve.add_argument(
        "--batch", type=positive, nargs="*", default=[1, 8, 32], help="sequences (default 1 8 32)"
    )
    serve.add_argument("--new-tokens", type=positive, default=33)
    serve.add_argument("--rounds", type=positive, default=5, help="(default %(default)s)")
    serve.add_argument("--dtype", default="bfloat16", help="as for `vllm serve` (default %(default)s)")
    serve.add_argument(
        "--compile", action="store_true", help="with torch.compile, vLLM's default (else eager)"
    )
    serve.add_argument("--avx2", action="store_true", help="hold vLLM, torch and our products to AVX2")
    serve.add_argument(
        "--processor-time", action="store_true", help="one thread and its processor time, for a busy machine"
    )
    serve.add_argument("--log", type=path, help="keep rounds here, and go on from those in it")
    serve.add_argument("--csv", type=path, help="append the rows to this file")
    serve.add_argument(
        "--profile", action="store_true", help="where the time goes, part by part (folders only, eager)"
    )
    serve.set_defaults(run_kind=_serve)


def _add_mlp(mlp: argparse.ArgumentParser) -> None:
    mlp.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="the first is dense")
    mlp.add_argument("--tokens", type=positive, nargs="+", default=[1, 8, 32, 128, 1024])
    mlp.add_argument("--layers", type=positive, default=12, help="MLPs that take turns (default %(default)s)")
    mlp.add_argument("--rounds", type=positive, default=10, help="(default %(default)s)")
    mlp.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    mlp.set_defaults(run_kind=_mlp)


def _mlp(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from neuronmlp_plugin.bench.one_mlp import measure_mlp
    from neuronmlp_plugin.compressor.job import ProgressBars

    models = named_folders("mlp", args.models)
    with ProgressBars(Console(stderr=True)).stage("timing", args.rounds * len(args.tokens)) as tick:
        results = measure_mlp(
            models,
            args.tokens,
            dtype=getattr(torch, args.dtype),
            layers=args.layers,
            rounds=args.rounds,
            tick=tick,
        )
    heads = f"{'tokens':>6}  {'model':<12}{'us':>10}{'speed-up':>10}"
    print(f"{heads}   (measured, {args.dtype}, one thread's processor time, least of {args.rounds})")
    for r in results:
        print(f"{r.tokens:>6}  {r.model:<12}{r.us:>10.0f}{r.speedup:>10.2f}")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from rich.console import Console

    from neuronmlp_plugin.bench.engines import EngineSettings
    from neuronmlp_plugin.bench.rows import Row, append_rows
    from neuronmlp_plugin.bench.serve import PROMPT_TOKENS, Cell, measure_serving
    from neuronmlp_plugin.compressor.job import ProgressBars

    if args.new_tokens < 2:
        raise UsageError(f"--new-tokens: expected at least 2, found {args.new_tokens}.")
    cells = [*(Cell("first", n) for n in args.first), *(Cell("decode", n) for n in args.batch)]
    length = max([PROMPT_TOKENS + args.new_tokens, *(n + 1 for n in args.first)])
    settings = EngineSettings(
        args.dtype, max([1, *args.batch]), length, args.compile, args.avx2, args.processor_time
    )
    models = named_folders("serve", args.models)
    if args.profile:
        return _profile(args, models, settings, cells)
    with ProgressBars(Console(stderr=True)).stage("timing", args.rounds * len(cells) * len(models)) as tick:
        results = measure_serving(
            models,
            settings,
            cells=cells,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
            log=args.log,
            tick=tick,
        )
    how = f"{args.dtype}, {'compiled' if args.compile else 'eager'}{', AVX2' if args.avx2 else ''}"
    how += ", one thread's processor time" if args.processor_time else ""
    _print_serving(results, how)
    if args.csv:
        metrics = (("seconds", "s"), ("speedup", "ratio"), ("ideal", "ratio"), ("peak_bytes", "bytes"))
        cases = [(f"serve {how} {r.model} {r.cell}", r) for r in results]
        append_rows(
            args.csv,
            [Row(case, m, unit, getattr(r, m), "measured") for case, r in cases for m, unit in metrics],
        )
    return 0


def _profile(args: argparse.Namespace, models: dict[str, pathlib.Path], settings: Any, cells: Any) -> int:
    from rich.console import Console

    from neuronmlp_plugin.bench.serve import measure_parts
    from neuronmlp_plugin.compressor.job import ProgressBars

    if args.compile or any(path.suffix == ".gguf" for path in models.values()):
        raise UsageError(
            "bench serve --profile: expected folders and no --compile: parts are vLLM's modules."
        )
    total = (args.rounds + 1) * len(cells) * len(models)
    with ProgressBars(Console(stderr=True)).stage("timing", total) as tick:
        found = measure_parts(
            models, settings, cells=cells, new_tokens=args.new_tokens, rounds=args.rounds, tick=tick
        )
    for cell in cells:
        columns = [found[name, str(cell)] for name in models]
        print(f"{f'{cell}, ms':<28}" + "".join(f"{name:>12}" for name in models))
        for part in columns[0]:
            print(f"  {part:<26}" + "".join(f"{1e3 * column[part]:>12.2f}" for column in columns))
        print(f"  {'all':<26}" + "".join(f"{1e3 * sum(column.values()):>12.2f}" for column in columns))
    return 0


def _print_serving(results: list[Any], how: str) -> None:
    heads = f"{'cell':<20}{'model':<12}{'ms':>10}{'speed-up':>10}{'ideal':>8}{'share':>8}{'peak GiB':>10}"
    print(f"{heads}   (measured, {how})")
    for r in results:
        ideal, share = (f"{r.ideal:.3f}", f"{r.share_of_ideal:.0%}") if r.ideal > 1 else ("-", "-")
        gain = f"{1e3 * r.seconds:>10.1f}{r.speedup:>10.3f}{ideal:>8}{share:>8}"
        print(f"{r.cell!s:<20}{r.model:<12}{gain}{r.peak_bytes / 2**30:>10.2f}")


def _rivals(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.bench.serve import write_q8_0, write_w8a8

    if args.w8a8 is None and args.gguf is None:
        raise UsageError("bench rivals: expected --w8a8 or --gguf, found neither.")
    for out in (args.w8a8, args.gguf):
        if out is not None and out.exists():
            raise UsageError(f"{out}: expected a path that is free, found something there.")
    if args.w8a8 is not None:
        print(f"written  {write_w8a8(args.dense, args.w8a8)}")
    if args.gguf is not None:
        print(f"written  {write_q8_0(args.dense, args.gguf)}")
    return 0


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
    decode.add_argument("--csv", type=path, help="append the rows to this file")
    decode.set_defaults(run_kind=_decode)
    add_kinds(kinds)
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

    from neuronmlp_plugin.bench.rows import Row, append_rows
    from neuronmlp_plugin.bench.serve import measure_decode
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
