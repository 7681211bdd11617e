"""`neuronmlp bench kernels`: our kernels, their bounds and the published algorithms, under one cost model. Simulated throughout."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from neuronmlp_plugin.bench.arguments import add_csv, add_model_arguments, one_of
from neuronmlp_plugin.bench.rows import Row, append_rows
from nki_kernels.cost.constants import SETS
from nki_kernels.targets import TARGETS

if TYPE_CHECKING:
    from neuronmlp_plugin.bench.kernel_cases import Result

KINDS = ("chain", "prefill", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kinds", nargs="*", default=[*KINDS], type=one_of(KINDS), metavar="KIND", help=f"{', '.join(KINDS)} (default: all)")
    add_model_arguments(parser)
    add_csv(parser)
    parser.add_argument(
        "--plots", type=pathlib.Path, metavar="DIR", help="draw roofline, latency by tokens and waterfall (needs matplotlib)"
    )
    parser.add_argument("--trace", type=pathlib.Path, metavar="FILE", help="write the last case's timeline for Perfetto")


def _line(times: Result) -> str:
    counters = times.best.estimate.counters
    shares = " ".join(f"{name} {us:.0f} ({us / times.simulated_us:.2f}x)" for name, us in times.others.items())
    bounds = f"{times.tensor_bound_us:>10.1f}{times.traffic_bound_us:>10.1f}{times.over_bound:>8.3f}"
    traffic = f"{counters.hbm_bytes / 1e6:>10.1f}{counters.hbm_bytes / counters.hbm_unique_bytes:>7.2f}"
    plan = f"{times.best.plan.block_tokens:>7}"
    return f"{times.case:<14}{times.tokens:>7}{times.simulated_us:>11.1f}{bounds}{traffic}{plan}  {times.winner:<8} {shares}"


HEAD = (
    f"{'case':<14}{'tokens':>7}{'fused us':>11}{'TensorE':>10}{'traffic':>10}{'/bound':>8}{'HBM MB':>10}{'/once':>7}{'block':>7}"
    "  fastest  others, us (and times the fused latency)"
)


def _rows(times: Result, target: str) -> Iterator[Row]:
    case = f"{times.case} T={times.tokens}"
    values = {"fused": times.simulated_us, "TensorE bound": times.tensor_bound_us, "traffic bound": times.traffic_bound_us, **times.others}
    for name, value in values.items():
        yield Row(f"kernels {case} {name}", "simulated_us", "us", value, "simulated", target)
    yield Row(f"kernels {case} fused", "hbm_bytes", "B", times.best.estimate.counters.hbm_bytes, "simulated", target)


def _write_trace(path: pathlib.Path, times: Result, args: argparse.Namespace) -> None:
    from nki_kernels.cost.baselines import BF16
    from nki_kernels.cost.estimate import schedule
    from nki_kernels.cost.launches import launch_of
    from nki_kernels.cost.perfetto import trace_json

    kernel, arguments = launch_of(times.best.plan, BF16)
    scheduler, _ = schedule(kernel, arguments, TARGETS[args.target], SETS[args.constants])
    about = f"{times.case} T={times.tokens}, {args.target}, constants {args.constants}"
    path.write_text(trace_json(scheduler.slots, about), encoding="utf-8")


def run(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.bench import plots
    from neuronmlp_plugin.bench.kernel_cases import cases

    target, constants = TARGETS[args.target], SETS[args.constants]
    print(f"simulated, one core of {target.name}, bf16, constants {constants.name} ({constants.source})\n{HEAD}")
    done = []
    for kind in args.kinds:
        for times in cases(kind, target, constants):
            print(_line(times), flush=True)
            done.append(times)
    if args.csv:
        where = f"{target.name}, constants {constants.name}"
        append_rows(args.csv, (row for times in done for row in _rows(times, where)))
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        plots.roofline(args.plots / "roofline.png", done, target, constants)
        plots.latency(args.plots / "latency.png", done, target, constants)
        plots.waterfall(args.plots / "waterfall.png", done, target, constants)
    if args.trace:
        _write_trace(args.trace, done[-1], args)
    return 0
