"""`neuronmlp bench kernels`: our kernels, their bounds and the published algorithms, under one cost model,
as tables, rows and pictures. Simulated throughout.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from neuronmlp_plugin.argument_types import path
from neuronmlp_plugin.bench.arguments import Write, add_csv, add_model_arguments, one_of, say
from neuronmlp_plugin.bench.rows import Row, append_rows
from nki_kernels.cost.constants import SETS, Constants
from nki_kernels.targets import PMAX, TARGETS, TURNAROUND_CYCLES, Target
from nki_kernels.tiling import MOVING_COLS

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
        type=path,
        metavar="DIR",
        help="draw roofline, latency by tokens and waterfall (needs matplotlib)",
    )
    parser.add_argument(
        "--trace", type=path, metavar="FILE", help="write the last case's timeline for Perfetto"
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
    """The three pictures; every title says that they are simulated."""
    target, constants = TARGETS[args.target], SETS[args.constants]
    folder.mkdir(parents=True, exist_ok=True)
    roofline(folder / "roofline.png", results, target, constants)
    latency(folder / "latency.png", results, target, constants)
    waterfall(folder / "waterfall.png", results, target, constants)


def _figure(title: str, target: Target, constants: Constants) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(
        f"{title}\nsimulated: one core of {target.name}, bf16, constants “{constants.name}”", fontsize=11
    )
    axes.grid(True, which="major", alpha=0.3)
    return figure, axes


def roofline(path: pathlib.Path, done: Sequence[Result], target: Target, constants: Constants) -> None:
    """Useful TFLOP/s of the fused kernels over their FLOPs per byte of HBM traffic, under the two roofs: DMA,
    and TensorE with its turnarounds (dotted: without).
    """
    figure, axes = _figure("Fused kernels under the roofline", target, constants)
    full = 2 * PMAX * PMAX * target.tensor_ghz / 1000
    peak = full * MOVING_COLS / (MOVING_COLS + TURNAROUND_CYCLES)
    low, high = 0.5, 4000.0
    corner = peak * 1000 / target.dma_achieved_gbps
    axes.plot([low, corner, high], [low * target.dma_achieved_gbps / 1000, peak, peak], color="black", lw=1.5)
    axes.plot([full * 1000 / target.dma_achieved_gbps, high], [full, full], ":", color="black", lw=1)
    axes.annotate(f"{peak:.0f} of {full:.0f} TFLOP/s", (high, full), ha="right", va="bottom")
    axes.annotate(
        f"{target.dma_achieved_gbps:.0f} GB/s", (2, 2.4 * target.dma_achieved_gbps / 1000), rotation=38
    )
    for name in dict.fromkeys(result.case for result in done):
        mine = [result.best.estimate for result in done if result.case == name]
        rates = [estimate.counters.flops / estimate.simulated_us / 1e6 for estimate in mine]
        axes.plot([estimate.counters.intensity for estimate in mine], rates, "o", label=name, alpha=0.8)
    axes.set(
        xscale="log", yscale="log", xlabel="useful FLOPs per byte of HBM traffic", ylabel="useful TFLOP/s"
    )
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def latency(path: pathlib.Path, done: Sequence[Result], target: Target, constants: Constants) -> None:
    """Latency by token count of the chain, or of the first case if there is no chain."""
    name = "chain" if any(result.case == "chain" for result in done) else done[0].case
    mine = sorted((result for result in done if result.case == name), key=lambda result: result.tokens)
    figure, axes = _figure(f"Latency by tokens: {name}", target, constants)
    axes.set_prop_cycle(color=("tab:red", "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown"))
    axes.plot(
        [t.tokens for t in mine], [t.simulated_us / 1000 for t in mine], "o-", lw=2, label="ours, fused"
    )
    for other in dict.fromkeys(key for result in mine for key in result.others):
        points = [(t.tokens, t.others[other] / 1000) for t in mine if other in t.others]
        axes.plot(*zip(*points, strict=True), "s--", ms=4, lw=1, label=other)
    axes.plot(
        [t.tokens for t in mine],
        [t.tensor_bound_us / 1000 for t in mine],
        color="black",
        lw=1,
        label="TensorE bound",
    )
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
    axes.legend()
    figure.savefig(path, dpi=120)


def waterfall(path: pathlib.Path, done: Sequence[Result], target: Target, constants: Constants) -> None:
    """Where the time of every fused launch goes: each moment is given to the first engine, from the left,
    that works in it.
    """
    figure, axes = _figure("Where the time goes", target, constants)
    figure.set_size_inches(9, 1.5 + 0.3 * len(done))
    labels = [f"{result.case} {result.tokens}" for result in done]
    left = [0.0] * len(done)
    for field in dataclasses.fields(done[0].best.estimate.exposed):
        shares = [
            100 * getattr(result.best.estimate.exposed, field.name) / result.simulated_us for result in done
        ]
        if max(shares) > 0.05:
            axes.barh(
                labels,
                shares,
                left=left,
                label={"tensor": "TensorE"}.get(field.name, f"{field.name}, exposed"),
            )
            left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set(xlabel="% of the latency", xlim=(0, 100))
    figure.legend(loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=120)
