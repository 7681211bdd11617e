"""`neuronmlp bench kernels`: our kernels, their bounds and the published algorithms, under one cost model.
Simulated throughout.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from neuronmlp_plugin.bench.arguments import Write, add_csv, add_model_arguments, one_of, say
from neuronmlp_plugin.bench.rows import Row, append_rows
from nki_kernels.cost.constants import SETS
from nki_kernels.targets import TARGETS

if TYPE_CHECKING:
    from neuronmlp_plugin.bench.kernel_cases import Result

KINDS = ("chain", "prefill", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kinds",
        nargs="*",
        default=[*KINDS],
        type=one_of(KINDS),
        metavar="KIND",
        help=f"{', '.join(KINDS)} (default: all)",
    )
    add_model_arguments(parser)
    add_csv(parser)
    parser.add_argument(
        "--plots",
        type=pathlib.Path,
        metavar="DIR",
        help="draw roofline, latency by tokens and waterfall (needs matplotlib)",
    )
    parser.add_argument(
        "--trace", type=pathlib.Path, metavar="FILE", help="write the last case's timeline for Perfetto"
    )


def _line(result: Result) -> str:
    counters = result.best.estimate.counters
    shares = " ".join(
        f"{name} {us:.0f} ({us / result.simulated_us:.2f}x)" for name, us in result.others.items()
    )
    bounds = f"{result.tensor_bound_us:>10.1f}{result.traffic_bound_us:>10.1f}{result.over_bound:>8.3f}"
    traffic = f"{counters.hbm_bytes / 1e6:>10.1f}{counters.hbm_bytes / counters.hbm_unique_bytes:>7.2f}"
    plan = f"{result.best.plan.block_tokens:>7}"
    return (
        f"{result.case:<14}{result.tokens:>7}{result.simulated_us:>11.1f}{bounds}{traffic}{plan}  "
        f"{result.winner:<8} {shares}"
    )


HEAD = (
    f"{'case':<14}{'tokens':>7}{'fused us':>11}{'TensorE':>10}{'traffic':>10}{'/bound':>8}"
    f"{'HBM MB':>10}{'/once':>7}{'block':>7}  fastest  others, us (and times the fused latency)"
)


def _rows(result: Result, target: str) -> Iterator[Row]:
    case = f"{result.case} T={result.tokens}"
    values = {
        "fused": result.simulated_us,
        "TensorE bound": result.tensor_bound_us,
        "traffic bound": result.traffic_bound_us,
        **result.others,
    }
    for name, value in values.items():
        yield Row(f"kernels {case} {name}", "simulated_us", "us", value, "simulated", target)
    yield Row(
        f"kernels {case} fused",
        "hbm_bytes",
        "B",
        result.best.estimate.counters.hbm_bytes,
        "simulated",
        target,
    )


def _write_trace(path: pathlib.Path, result: Result, args: argparse.Namespace) -> None:
    from nki_kernels.cost.baselines import BF16
    from nki_kernels.cost.estimate import schedule
    from nki_kernels.cost.launches import launch_of
    from nki_kernels.cost.perfetto import trace_json

    kernel, arguments = launch_of(result.best.plan, BF16)
    scheduler, _ = schedule(kernel, arguments, TARGETS[args.target], SETS[args.constants])
    about = f"{result.case} T={result.tokens}, {args.target}, constants {args.constants}"
    path.write_text(trace_json(scheduler.slots, about), encoding="utf-8")


def run(args: argparse.Namespace) -> int:
    results = report(args)
    if args.csv:
        append_rows(args.csv, csv_rows(results, args))
    if args.plots:
        draw(args.plots, results, args)
    if args.trace:
        _write_trace(args.trace, results[-1], args)
    return 0


def report(args: argparse.Namespace, write: Write = say) -> list[Result]:
    """All cases, a line each as it is done."""
    from neuronmlp_plugin.bench.kernel_cases import cases

    target, constants = TARGETS[args.target], SETS[args.constants]
    write(f"simulated, one core of {target.name}, bf16, constants {constants.name} ({constants.source})")
    write(HEAD)
    done = []
    for kind in args.kinds:
        for result in cases(kind, target, constants):
            write(_line(result))
            done.append(result)
    return done


def csv_rows(results: list[Result], args: argparse.Namespace) -> Iterator[Row]:
    """The rows of all cases."""
    where = f"{args.target}, constants {args.constants}"
    for result in results:
        yield from _rows(result, where)


def draw(folder: pathlib.Path, results: list[Result], args: argparse.Namespace) -> None:
    """The three pictures."""
    from neuronmlp_plugin.bench import plots

    target, constants = TARGETS[args.target], SETS[args.constants]
    folder.mkdir(parents=True, exist_ok=True)
    plots.roofline(folder / "roofline.png", results, target, constants)
    plots.latency(folder / "latency.png", results, target, constants)
    plots.waterfall(folder / "waterfall.png", results, target, constants)
