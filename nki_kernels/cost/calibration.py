"""Every published latency and traffic that the model is held against, and what it predicts for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from nki_kernels.backend import nisa, nl
from nki_kernels.cost import baselines
from nki_kernels.cost.constants import Constants
from nki_kernels.cost.estimate import Estimate, price
from nki_kernels.cost.launches import price_plan
from nki_kernels.layout import DENSE
from nki_kernels.planner import plan_mlp
from nki_kernels.simulator import Placeholder
from nki_kernels.targets import TRN1, TRN2, Target
from nki_kernels.tile_plan import Plan

Predict = Callable[[Constants], Estimate]
TUTORIAL = (4096, 8192, 8192)
CHAIN = (8192, 4096, 16384)  # K, R, N of the paper
FITTED, SEEN, UNSEEN, OTHER_KERNEL, NO_KERNEL = "fitted", "seen", "unseen", "other kernel", "no kernel"
GIB_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Published:
    """One published latency, or HBM traffic. `role`: "fitted", a constant was fitted to it; "seen", it was in
    view while the rules of the model were chosen, but no constant was fitted to it; "unseen", neither;
    "other kernel", an algorithm that we do not have, so only a floor; "no kernel", nothing public to run.

    `tolerance`: the error that we promise not to exceed, or None where the row only informs. `unit`: "us" or
    "GiB"; `predict` gives an estimate that has both.
    """

    name: str
    source: str
    published: float
    role: str
    tolerance: float | None = None
    predict: Predict | None = None
    unit: str = "us"

    def value(self, estimate: Estimate) -> float:
        """What of an estimate the row is about."""
        return estimate.simulated_us if self.unit == "us" else estimate.counters.hbm_bytes / GIB_BYTES


@dataclasses.dataclass(frozen=True)
class Judged:
    """A row and its prediction (None: nothing to predict it with)."""

    row: Published
    simulated: float | None

    @property
    def error(self) -> float | None:
        """Predicted against published, relative."""
        return None if self.simulated is None else self.simulated / self.row.published - 1

    @property
    def holds(self) -> bool:
        """Whether the promise of the row, if it makes one, is kept."""
        return self.error is None or self.row.tolerance is None or abs(self.error) <= self.row.tolerance


def copy_row_block(src: object) -> object:
    """Four rows of 8 KiB from HBM into four partitions: the transfer that AWS's profile shows on one
    engine.
    """
    tile = nl.ndarray((4, 4096), dtype=nl.bfloat16, buffer=nl.sbuf)
    out = nl.ndarray((4, 4096), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=tile, src=src)
    nisa.dma_copy(dst=out, src=tile)
    return out


def _transfer_alone(constants: Constants) -> Estimate:
    """Busy time of one engine for the load of `copy_row_block`: half of the kernel's work, which the pipe
    spreads over 16 engines.
    """
    whole = price(copy_row_block, (Placeholder((4, 4096), baselines.BF16),), TRN2, constants)
    return Estimate(simulated_us=whole.busy.dma * TRN2.dma_engines / 2)


def _dense_mlp(tokens: int, hidden: int, intermediate: int, target: Target, constants: Constants) -> Estimate:
    plan = plan_mlp(
        hidden, intermediate, (DENSE, DENSE, DENSE), tokens, np.dtype(baselines.BF16), target=target
    )
    if not isinstance(plan, Plan):
        raise ValueError(plan.reason)
    return price_plan(plan, baselines.BF16, target, constants)


def published_rows() -> list[Published]:
    """All rows, one NeuronCore, bf16. The paper's latencies and traffic are read off its figures (+-0.4 ms,
    +-0.2 GiB).
    """
    return [*_tutorial_rows(), *_paper_rows(), *_other_rows()]


def _tutorial_rows() -> list[Published]:
    source = "AWS matmul tutorial, trn1"
    m, k, n = TUTORIAL
    steps = [("tiled", 51_800, FITTED), ("hoisted", 42_960, FITTED), ("wide", 22_070, UNSEEN)]

    def step(name: str) -> Predict:
        return lambda c: baselines.tutorial(name, m, k, n, TRN1, c)

    size = f"{m} x {k} x {n}"
    rows = [
        Published(f"matmul {name} {size}", source, us, role, 0.15, step(name)) for name, us, role in steps
    ]
    blocked: Predict = lambda c: baselines.aws_matmul(m, k, n, TRN1, c, m_tiles=16)  # noqa: E731
    return [*rows, Published(f"matmul blocked {size}", source, 6_970, SEEN, 0.15, blocked)]


PAPER_US = {  # AWS's matmul dense, twice, the paper's kernel
    8_192: (43_900, 26_700, 21_100),
    16_384: (88_800, 56_400, 42_000),
    32_768: (186_700, 116_900, 84_200),
}
PAPER_GIB = {16_384: (15.6, 9.5, 3.78), 32_768: (35.7, 22.4, 7.46)}
PAPER_KERNELS = ("AWS matmul, dense", "AWS matmul, twice", "the paper's fused kernel")


def paper_estimate(kernel: str, tokens: int, constants: Constants) -> Estimate:
    """One of PAPER_KERNELS at a size of the paper, on trn1."""
    k, r, n = CHAIN
    if kernel == PAPER_KERNELS[0]:
        return baselines.aws_matmul(tokens, k, n, TRN1, constants)
    priced = baselines.aws_twice if kernel == PAPER_KERNELS[1] else baselines.paper_fused
    return priced(tokens, k, r, n, TRN1, constants)


def _paper_rows() -> list[Published]:
    source = "arXiv 2510.25977, trn1"

    def predict(kernel: str, tokens: int) -> Predict:
        return lambda c: paper_estimate(kernel, tokens, c)

    rows = [
        Published(f"{kernel}, T = {tokens}", source, us,
                  SEEN if tokens == 8_192 else UNSEEN, 0.20, predict(kernel, tokens))
        for tokens, values in PAPER_US.items()
        for kernel, us in zip(PAPER_KERNELS, values, strict=True)
    ]  # fmt: skip
    for tokens, values in PAPER_GIB.items():
        for kernel, gib, within in zip(PAPER_KERNELS, values, (None, None, 0.05), strict=True):
            name = f"traffic of {kernel}, T = {tokens}"
            rows.append(Published(name, source, gib, UNSEEN, within, predict(kernel, tokens), "GiB"))
    for name, us in (("dense", 32_900), ("twice", 24_400)):
        rows.append(Published(f"compiler's matmul, {name}, T = 8192", source, us, NO_KERNEL))
    return rows


def _other_rows() -> list[Published]:
    library = "nki-library test vectors, trn2, read as ps"
    return [
        Published("one DMA, 4 rows of 8 KiB", "AWS profile, trn2", 1.416, SEEN, 0.15, _transfer_alone),
        Published("dense MLP T = 8192, H = 8192, I = 448", library, 3_785, OTHER_KERNEL, None,
                  lambda c: _dense_mlp(8192, 8192, 448, TRN2, c)),
        Published("dense MLP T = 512, H = 1024, I = 448", library, 80, OTHER_KERNEL, None,
                  lambda c: _dense_mlp(512, 1024, 448, TRN2, c)),
    ]  # fmt: skip


def judge(rows: Iterable[Published], constants: Constants) -> Iterator[Judged]:
    """Predict every row that can be predicted, one by one."""
    for row in rows:
        yield Judged(row, row.value(row.predict(constants)) if row.predict else None)
