"""The ways in which a model's MLPs can be stored at one removed ratio, as one core of `tp` computes them.

dense    every matrix whole, I / tp channels a core: what there is without compression
narrow   dense matrices of fewer channels: k / tp a core, and the one all-reduce of a dense MLP
groups   one group of channels a core, factorised by itself (`uv` or `compact`): an MLP of one group on I / tp
         channels, and the one all-reduce of a dense MLP
gather   one group for all cores: three launches, an all-gather and a reduce-scatter more

Ranks of a group, and the channels of a narrow layer, end on row tiles of 128, as `compress
--rank-multiple 128` makes them: a rank of 385 would read four tiles. A budget lies between two such sizes;
layers then have the one or the other, in the share that meets the budget exactly, and their mean is what a
step takes.
"""

from __future__ import annotations

import dataclasses

from nki_kernels.cost.models import ModelShape, rank_at
from nki_kernels.layout import DENSE, Layout, Projection, int8_layout, mlp_layout
from nki_kernels.request import gathered_projection, gathered_stages
from nki_kernels.targets import PMAX


@dataclasses.dataclass(frozen=True)
class CoreMLP:
    """One core's launches, and what a token's z has between them: elements gathered (gate, up) and scattered
    (down).
    """

    launches: tuple[Layout, ...]
    gathered: int = 0
    scattered: int = 0


Blend = tuple[tuple[float, CoreMLP], ...]  # (share of the layers, what they are), shares summing to 1


def dense(shape: ModelShape, tp: int) -> Blend:
    """Nothing removed."""
    return ((1.0, _whole(shape.hidden, shape.intermediate // tp, DENSE)),)


def narrow(shape: ModelShape, tp: int, removed_ratio: float) -> Blend:
    """(1 - removed_ratio) of the channels."""
    channels = shape.intermediate // tp
    wanted = (1 - removed_ratio) * channels
    low, high = _tiles_around(wanted, channels)
    sizes = [(float(k), _whole(shape.hidden, k, DENSE)) for k in (low, high)]
    return _blend(sizes, wanted)


def groups(shape: ModelShape, tp: int, form: str, removed_ratio: float) -> Blend:
    """A group a core, in `form`."""
    channels = shape.intermediate // tp
    rank = rank_at(shape.hidden, channels, form, removed_ratio)
    low, high = _tiles_around(rank, min(channels, shape.hidden))
    sizes = [
        (
            float(_stored(shape.hidden, channels, form, r)),
            _whole(shape.hidden, channels, Projection.whole(form, r)),
        )
        for r in (low, high)
    ]
    return _blend(sizes, (1 - removed_ratio) * shape.hidden * channels)


def gather(shape: ModelShape, tp: int, form: str, removed_ratio: float) -> Blend:
    """One group on all cores, its rank as the budget has it: no rounding would help every share of it."""
    rank = rank_at(shape.hidden, shape.intermediate, form, removed_ratio)
    share = gathered_projection(form, rank, tp)
    stages = gathered_stages(shape.hidden, shape.intermediate // tp, (share, share, share))
    return ((1.0, CoreMLP(tuple(stages.values()), 2 * share.rank, share.rank)),)


def in_int8(blend: Blend) -> Blend:
    """The same with weights of one byte."""
    return tuple(
        (share, dataclasses.replace(core, launches=tuple(int8_layout(layout) for layout in core.launches)))
        for share, core in blend
    )


FORMS = {
    "groups compact": lambda shape, tp, removed: groups(shape, tp, "compact", removed),
    "groups uv": lambda shape, tp, removed: groups(shape, tp, "uv", removed),
    "narrow": narrow,
    "gather compact": lambda shape, tp, removed: gather(shape, tp, "compact", removed),
}


def _whole(hidden: int, channels: int, projection: Projection) -> CoreMLP:
    return CoreMLP((mlp_layout(hidden, channels, projection, projection, projection),))


def _stored(hidden: int, channels: int, form: str, rank: int) -> int:
    """Parameters of a projection's factors."""
    return rank * (hidden + channels - (rank if form == "compact" else 0))


def _tiles_around(size: float, largest: int) -> tuple[int, int]:
    """The multiples of a row tile on either side of `size`, at most `largest`. Raises ValueError where there
    is none below.
    """
    low = int(size) // PMAX * PMAX
    if low == 0 and size < largest:
        raise ValueError(
            f"expected a rank or channels of at least {PMAX}, a row tile, found {int(size)}; remove less."
        )
    return min(low, largest), min(low + PMAX, largest)


def _blend(sizes: list[tuple[float, CoreMLP]], wanted: float) -> Blend:
    """Shares of the two sizes (amount, what) whose mean amount is `wanted`."""
    (low, small), (high, large) = sizes
    if wanted <= low or low == high:
        return ((1.0, small),)
    share = min(1.0, (wanted - low) / (high - low))
    return ((1 - share, small), (share, large))
