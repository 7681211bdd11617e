"""How long one core of a tensor-parallel MLP takes: its launches by their kernels, the collectives between
and behind them by formulas. Nothing overlaps.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nki_kernels.cost.constants import Constants
from nki_kernels.cost.interconnect import Collectives
from nki_kernels.cost.launches import price_launch
from nki_kernels.cost.mlp_forms import Blend, CoreMLP
from nki_kernels.layout import Layout
from nki_kernels.request import stage_request
from nki_kernels.targets import Target

BYTES = 2  # of a bf16 element


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a prediction of several cores depends on besides the model."""

    target: Target
    constants: Constants
    collectives: Collectives
    tp: int = 1


@dataclasses.dataclass(frozen=True)
class MLPTime:
    """Simulated, in us: the launches of one core, and the collectives."""

    kernels_us: float
    collectives_us: float

    @property
    def simulated_us(self) -> float:
        return self.kernels_us + self.collectives_us


def launch_us(
    layout: Layout, tokens: int, dtype: np.dtype, target: Target, constants: Constants, tp: int
) -> float:
    """One launch as serving runs it. Raises ValueError where there is no plan."""
    request = stage_request(layout, tokens, dtype)
    return price_launch(request, target, constants, tp).estimate.simulated_us


def collectives_us(core: CoreMLP, hidden: int, tokens: int, setting: Setting) -> float:
    """All-gather of gate's and up's z and reduce-scatter of down's, where there are any; all-reduce of y
    (bf16).
    """
    tp, target, between = setting.tp, setting.target, setting.collectives
    if tp == 1:
        return 0.0
    total = between.all_reduce_us(tokens * hidden * BYTES, tp, target)
    for elements in (core.gathered, core.scattered):
        if elements:
            total += between.gather_us(tokens * elements * BYTES, tp, target)
    return total


def mlp_time(blend: Blend, hidden: int, tokens: int, dtype: np.dtype, setting: Setting) -> MLPTime:
    """The mean MLP of a model. Raises ValueError where no plan fits."""
    kernels = between = 0.0
    for share, core in blend:
        on = setting.target, setting.constants, setting.tp
        kernels += share * sum(launch_us(layout, tokens, dtype, *on) for layout in core.launches)
        between += share * collectives_us(core, hidden, tokens, setting)
    return MLPTime(kernels, between)
