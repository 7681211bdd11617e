"""One core of a tensor-parallel MLP (scheme `gather`): its launches, and the collectives between them as
formulas.

Ring formulas of the runtime's collectives pages: over n cores, an all-gather or a reduce-scatter of B bytes
takes (n - 1) steps and moves (n - 1) / n B over each core's link; an all-reduce twice that. A core's link is
its share of the chip's. Nothing overlaps.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nki_kernels.cost.constants import CALIBRATED, HOP_US, LINK_GBPS, Constants
from nki_kernels.cost.search import Found, search
from nki_kernels.layout import Layout, Projection, first_stage, last_stage, mlp_layout, second_stage
from nki_kernels.request import stage_request
from nki_kernels.targets import TRN1, Target
from nki_kernels.tiling import tile_count


def gather_us(size_bytes: float, cores: int, target: Target = TRN1) -> float:
    """All-gather to, or reduce-scatter of, `size_bytes` over `cores`."""
    link = LINK_GBPS[target.name] / target.cores_per_chip
    return (cores - 1) * (HOP_US + size_bytes / cores / link / 1000)


def all_reduce_us(size_bytes: float, cores: int, target: Target = TRN1) -> float:
    """A reduce-scatter and an all-gather."""
    return 2 * gather_us(size_bytes, cores, target)


def shard(form: str, rank: int, intermediate: int, tp: int) -> Projection:
    """One core's share of a projection; R / tp is rounded up, as zeros fill the last core's share."""
    if form == "dense":
        return Projection.whole("dense")
    slots = tile_count(rank, tp)
    pivots = min(slots, intermediate // tp) if form == "compact" else 0
    return Projection(form, tp * slots, slots, pivots)


def stages(
    hidden: int, intermediate: int, projections: tuple[Projection, Projection, Projection], tp: int
) -> list[Layout]:
    """The launches of one core; one, with everything, where there is no parallelism."""
    whole = mlp_layout(hidden, intermediate // tp, *projections)
    if tp == 1:
        return [whole]
    found = [second_stage(whole)]
    if whole.gate_first or whole.up_first:
        found.insert(0, first_stage(whole))
    if whole.down_first:
        found.append(last_stage(whole))
    return found


@dataclasses.dataclass(frozen=True)
class MLPTime:
    """All simulated, in us. `launches`: what each kernel launch takes; `collectives_us`: the sum between and
    behind them.
    """

    launches: tuple[Found, ...]
    collectives_us: float

    @property
    def kernels_us(self) -> float:
        return sum(found.estimate.simulated_us for found in self.launches)

    @property
    def simulated_us(self) -> float:
        return self.kernels_us + self.collectives_us


def collectives_us(
    hidden: int, projections: tuple[Projection, ...], tokens: int, tp: int, target: Target = TRN1
) -> float:
    """All-gather of gate's and up's z, reduce-scatter of down's, all-reduce of y (bf16)."""
    if tp == 1:
        return 0.0
    gate, up, down = (projection.rank for projection in projections)
    total = all_reduce_us(tokens * hidden * 2, tp, target)
    if gate or up:
        total += gather_us(tokens * (gate + up) * 2, tp, target)
    return total + (gather_us(tokens * down * 2, tp, target) if down else 0.0)


def mlp_time(
    sizes: tuple[int, int], forms: tuple[tuple[str, int], ...], tokens: int, dtype: np.dtype, tp: int = 1,
    target: Target = TRN1, constants: Constants = CALIBRATED,
) -> MLPTime:  # fmt: skip
    """A gated MLP, sizes = (H, I), `forms` = (form, rank) of gate, up and down, on `tp` cores. Raises
    ValueError where no plan fits.
    """
    hidden, intermediate = sizes
    gate, up, down = (shard(form, rank, intermediate, tp) for form, rank in forms)
    launches = []
    for layout in stages(hidden, intermediate, (gate, up, down), tp):
        found = search(stage_request(layout, tokens, dtype), target, constants, tp)
        if not isinstance(found, Found):
            raise ValueError(found.reason)
        launches.append(found)
    return MLPTime(tuple(launches), collectives_us(hidden, (gate, up, down), tokens, tp, target))
