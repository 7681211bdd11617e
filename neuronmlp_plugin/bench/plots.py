"""Pictures of simulated results; every title says so."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from neuronmlp_plugin.bench.kernel_cases import Result
from nki_kernels.cost.constants import Constants
from nki_kernels.targets import PMAX, TURNAROUND_CYCLES, Target
from nki_kernels.tiling import MOVING_COLS


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
