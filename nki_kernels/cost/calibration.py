"""Every published latency that the model is held against, and what it predicts for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from nki_kernels.backend import nisa, nl
from nki_kernels.cost import baselines
from nki_kernels.cost.constants import Constants
from nki_kernels.cost.estimate import Estimate, price
from nki_kernels.cost.launches import price_plan
from nki_kernels.layout import DENSE
from nki_kernels.plan import Plan
from nki_kernels.planner import plan_mlp
from nki_kernels.simulator import Placeholder
from nki_kernels.targets import TRN1, TRN2, Target

Predict = Callable[[Constants], Estimate]
TUTORIAL = (4096, 8192, 8192)
CHAIN = (8192, 4096, 16384)  # K, R, N of the paper
FITTED, SEEN, OTHER_KERNEL, NO_KERNEL = "fitted", "seen", "other kernel", "no kernel"


@dataclasses.dataclass(frozen=True)
class Published:
    """One published latency. `role`: "fitted", a constant was fitted to it; "seen", it was in view while the
    rules of the model were chosen, but no constant was fitted to it; "other kernel", an algorithm that we do
    not have, so only a floor; "no kernel", nothing public to run.

    `tolerance`: the error that we promise not to exceed, or None where the row only informs.
    """

    name: str
    source: str
    published_us: float
    role: str
    tolerance: float | None = None
    predict: Predict | None = None


@dataclasses.dataclass(frozen=True)
class Judged:
    """A row and its prediction (None: nothing to predict it with)."""

    row: Published
    simulated_us: float | None

    @property
    def error(self) -> float | None:
        """Predicted against published, relative."""
        return None if self.simulated_us is None else self.simulated_us / self.row.published_us - 1

    @property
    def holds(self) -> bool:
        """Whether the promise of the row, if it makes one, is kept."""
        return self.error is None or self.row.tolerance is None or abs(self.error) <= self.row.tolerance


def copy_row_block(src: object) -> object:
    """Four rows of 8 KiB from HBM into four partitions: the transfer that AWS's profile shows on one engine."""
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
    """All rows, one NeuronCore, bf16."""
    tutorial, paper, library = (
        "AWS matmul tutorial, trn1",
        "arXiv 2510.25977, trn1",
        "nki-library test vectors, trn2, read as ps",
    )
    dense, twice = CHAIN[0::2], CHAIN

    def step(name: str) -> Predict:
        return lambda c: baselines.tutorial(name, *TUTORIAL, TRN1, c)

    return [
        Published("matmul tiled 4096 x 8192 x 8192", tutorial, 51_800, FITTED, 0.15, step("tiled")),
        Published("matmul hoisted 4096 x 8192 x 8192", tutorial, 42_960, FITTED, 0.15, step("hoisted")),
        Published("AWS matmul, dense, T = 8192", paper, 43_900, SEEN, 0.20, lambda c: baselines.aws_matmul(8192, *dense, TRN1, c)),
        Published("AWS matmul, twice, T = 8192", paper, 26_700, SEEN, 0.20, lambda c: baselines.aws_twice(8192, *twice, TRN1, c)),
        Published("the paper's fused kernel, T = 8192", paper, 21_100, SEEN, 0.20, lambda c: baselines.paper_fused(8192, *twice, TRN1, c)),
        Published("the paper's fused kernel, T = 32768, from its 85.2 % MFU", paper, 84_400, SEEN, 0.20,
                  lambda c: baselines.paper_fused(32768, *twice, TRN1, c)),
        Published("compiler's matmul, dense, T = 8192", paper, 32_900, NO_KERNEL),
        Published("compiler's matmul, twice, T = 8192", paper, 24_400, NO_KERNEL),
        Published("one DMA, 4 rows of 8 KiB", "AWS profile, trn2", 1.416, SEEN, 0.15, _transfer_alone),
        Published("dense MLP T = 8192, H = 8192, I = 448", library, 3_785, OTHER_KERNEL, None,
                  lambda c: _dense_mlp(8192, 8192, 448, TRN2, c)),
        Published("dense MLP T = 512, H = 1024, I = 448", library, 80, OTHER_KERNEL, None, lambda c: _dense_mlp(512, 1024, 448, TRN2, c)),
    ]  # fmt: skip


def judge(rows: list[Published], constants: Constants) -> list[Judged]:
    """Predict every row that can be predicted."""
    return [Judged(row, row.predict(constants).simulated_us if row.predict else None) for row in rows]
