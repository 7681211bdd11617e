"""The MLP of one rank by NKI kernels: one launch for all of it where the layer fits the ranks, or three
between the collectives of scheme `gather`.

For that scheme NxDI compiles one graph for all ranks, while a rank's pivots sit at its own place in the
gathered z. So the z that a launch gets and gives begins with the rank's own share (`own_first`), its weights
are packed for that order, and the rank is data: NxDI's SPMDRank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.models.definition import Tensors, Weight, joined
from neuronmlp_plugin.models.factors import IN, OUT, PROJECTIONS, Matrix, MLPLayer
from neuronmlp_plugin.serving.trainium.sharding import Parallel, kernel_reading, lay_out, partition_dim
from nki_kernels.kernels.sharded import first_factors, last_factor, second_factors
from nki_kernels.kernels.svd_mlp import svd_mlp
from nki_kernels.layout import Layout, Projection, int8_layout, mlp_layout
from nki_kernels.packing import pack, pack_scales
from nki_kernels.planner import Declined, plan_launch
from nki_kernels.request import Request, gathered_projection, gathered_stages, stage_request
from nki_kernels.targets import PMAX
from nki_kernels.tile_plan import Plan

_NUMPY_DTYPES = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}


def stage_layouts(stored: MLPLayer, tp: int) -> dict[str, Layout]:
    """What each launch computes, by name: `whole` where the layer fits the ranks; under `gather`, `first`,
    `second` and `last` as far as the forms need them; of int8 where that is how weights are read.
    """
    if stored.gathers(tp):
        gate, up, down = (_projection(matrix, tp) for matrix in stored.matrices.values())
        layouts = gathered_stages(stored.hidden_size, stored.channels // tp, (gate, up, down))
    else:
        mine = stored.share(tp)
        projections = [Projection.whole(spec.form, spec.rank, mine.groups) for spec in mine.values()]
        layouts = {"whole": mlp_layout(mine.hidden_size, mine.channels, *projections)}
    if not kernel_reading(stored, tp).int8:
        return layouts
    return {stage: int8_layout(layout) for stage, layout in layouts.items()}


def _projection(matrix: Matrix, tp: int) -> Projection:
    """A matrix under `gather`."""
    return gathered_projection(matrix.spec.form, matrix.spec.rank or 0, tp)


def turned(stored: MLPLayer) -> tuple[bool, bool]:
    """Whether the z of gate and up, and that of down, travel own share first under `gather`: only pivots ask
    for it.
    """
    gate, up, down = (matrix.pivots > 0 for matrix in stored.matrices.values())
    return gate or up, down


def _request(layout: Layout, tokens: int, dtype: torch.dtype, norm_eps: float | None) -> Request:
    return stage_request(layout, tokens, np.dtype(_NUMPY_DTYPES[dtype]), norm_eps)


def declined(stored: MLPLayer, tp: int, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take the layer, in a sentence, or None. What fits 128 tokens fits any number,
    block by block.
    """
    for layout in stage_layouts(stored, tp).values():
        plan = plan_launch(_request(layout, PMAX, dtype, norm_eps=1e-5))
        if isinstance(plan, Declined):
            return plan.reason
    return None


def pack_layer(
    stored: MLPLayer, weights: Mapping[str, Tensors], tp: int, dtype: torch.dtype
) -> dict[str, Weight]:
    """Launch -> packed weights `[tp 128, C]`, and scales `[tp 128, S]` where they are int8, whose contiguous
    slices are the ranks', from each projection's tensors of FORMAT.md; expanded ones are in `dtype`.
    """
    gathers, layouts, reading = stored.gathers(tp), stage_layouts(stored, tp), kernel_reading(stored, tp)
    whole = {
        name: lay_out(matrix, reading.tensors(matrix, weights[name], dtype), tp, gathers)
        for name, matrix in stored.matrices.items()
    }
    packed: dict[str, list[Weight]] = {stage: [] for stage in layouts}
    for rank in range(tp):
        matrices = _rank_matrices(stored, whole, tp, rank)
        for stage, layout in layouts.items():
            mine = {name: weight for name, weight in matrices.items() if layout.matrix(name) is not None}
            packed[stage].append(_pack(layout, mine))
    return {stage: joined(slices, OUT) for stage, slices in packed.items()}


def _pack(layout: Layout, matrices: Mapping[str, Weight]) -> Weight:
    """One rank's weights `[128, C]` of one launch, with scales `[128, S]` where the layout is of int8."""
    values = {name: weight.values for name, weight in matrices.items()}
    dtype = next(iter(values.values())).dtype
    packed = pack(layout, values, torch.zeros(PMAX, layout.packed_cols, dtype=dtype))
    if not layout.is_int8:
        return Weight(packed)
    scales = {name: weight.scale for name, weight in matrices.items()}
    return Weight(packed, pack_scales(layout, scales, torch.ones(PMAX, layout.scale_cols)))


def _rank_matrices(
    stored: MLPLayer, whole: Mapping[str, Mapping[str, Weight]], tp: int, rank: int
) -> dict[str, Weight]:
    """One rank's matrices `[out, in]` by the names that `nki_kernels.layout` gives them, under `gather` with
    z in own-first order.
    """
    matrices, gathers, turns = {}, stored.gathers(tp), turned(stored)
    for name, matrix in stored.matrices.items():
        short, parts = name.removesuffix("_proj"), {}
        for part, weight in whole[name].items():
            dim = partition_dim(matrix, part, gathers)
            parts[part] = _slice(weight, tp, rank, dim)
        if not matrix.spec.is_low_rank:
            # To the kernels every dense matrix is a second one: it makes the output, gate's and up's too.
            (matrices[f"{short}_second"],) = parts.values()
            continue
        if gathers and turns[matrix.is_down]:
            z_part, dim = ("first", OUT) if matrix.is_down else ("second", IN)
            parts[z_part] = _turned_back(parts[z_part], tp, rank, dim)
        matrices |= {f"{short}_{part}": weight for part, weight in parts.items()}
    return matrices


def _slice(weight: Weight, tp: int, rank: int, dim: int) -> Weight:
    return weight.rearranged(lambda t: t.chunk(tp, dim)[rank], dim)


def _turned_back(weight: Weight, tp: int, rank: int, dim: int) -> Weight:
    """Rank-major slots of z along `dim`, those of `rank` first."""
    slots = weight.values.shape[dim] // tp
    # The matrix in the order of `own_first`: share rank + i of z stands at place i.
    return weight.rearranged(lambda t: t.roll(-rank * slots, dims=dim), dim)


def own_first(z: torch.Tensor, rank: torch.Tensor, tp: int) -> torch.Tensor:
    """Rank-major z, `[tp n, T]` or `[tp T, n]` -> the same with the share of `rank` `[1]` first, then those
    of rank + 1, ... around the ring.
    """
    # By indices and not by slices: the rank is known only when the graph runs.
    order = (torch.arange(tp, device=z.device) + rank) % tp
    return z.reshape(tp, -1, z.shape[-1]).index_select(0, order).reshape(z.shape)


def rank_major(z: torch.Tensor, rank: torch.Tensor, tp: int) -> torch.Tensor:
    """The inverse of `own_first`."""
    return own_first(z, -rank, tp)


def call(kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Launch a kernel on the tensors as they are: inside NxDI's trace, `nki.jit` makes it part of the
    graph.
    """
    return kernel(*arguments)


class Norm(NamedTuple):
    """An RMSNorm as the kernels take it: weight `[128, ceil(H / 128)]` fp32 (nki_kernels.packing.pack_norm),
    and epsilon.
    """

    weight: torch.Tensor
    eps: float


def pack_norm_in_graph(weight: torch.Tensor) -> torch.Tensor:
    """`pack_norm` by torch operations alone, for a weight that is a parameter of NxDI's and packed while
    tracing.
    """
    # [tiles, 128], then turned round: element p, k belongs to channel 128 k + p.
    tiles = F.pad(weight.float(), (0, -weight.shape[0] % PMAX)).reshape(-1, PMAX)
    return tiles.t().contiguous()


class KernelPath(nn.Module):
    """One rank's packed weights, and the launches that read them."""

    launch: Callable[..., Any] = staticmethod(call)

    def __init__(self, stored: MLPLayer, parallel: Parallel) -> None:
        super().__init__()
        self.layouts = stage_layouts(stored, parallel.size)
        self.slots = tuple(_projection(stored.matrix(p), parallel.size).slots for p in PROJECTIONS)
        self.turn_z, self.turn_down = turned(stored)
        self.parallel = parallel
        for stage, layout in self.layouts.items():
            self.add_module(stage, _packed_module(layout, parallel))
        self.rank = parallel.rank_module() if stored.gathers(parallel.size) else None
        self.plans: dict[tuple[str, int, float | None], Plan] = {}

    def forward(self, x: torch.Tensor, rmsnorm: Any = None) -> torch.Tensor:
        """This rank's summand of y `[..., H]`, from x `[..., H]`; `rmsnorm`, a module, is applied to x by the
        kernels themselves.
        """
        norm = None if rmsnorm is None else Norm(pack_norm_in_graph(rmsnorm.weight), rmsnorm.variance_epsilon)
        rows = x.reshape(-1, x.shape[-1])
        y = (
            self._whole(rows, norm)
            if self.rank is None
            else self._between_collectives(rows, norm, self.rank.get_rank())
        )
        return y.reshape(x.shape)

    def _whole(self, rows: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        return self.launch(svd_mlp, rows, *self._rest("whole", rows, norm))

    def _between_collectives(self, rows: torch.Tensor, norm: Norm | None, rank: torch.Tensor) -> torch.Tensor:
        tp = self.parallel.size
        z = None
        if "first" in self.layouts:
            z = self.launch(first_factors, rows, *self._rest("first", rows, norm))
            z = self.parallel.gather(z, 0)
            z = own_first(z, rank, tp) if self.turn_z else z
        needs_x = rows if self.layouts["second"].hidden else None
        out = self.launch(second_factors, needs_x, z, self.slots, *self._rest("second", rows, norm))
        if "last" not in self.layouts:
            return out
        z = self.parallel.scatter_sum(rank_major(out, rank, tp) if self.turn_down else out, 0)
        return self.launch(last_factor, z, *self._rest("last", rows, norm))

    def _rest(self, stage: str, rows: torch.Tensor, norm: Norm | None) -> tuple[Any, ...]:
        """A launch's further arguments, by position: packed weights, the plan for as many rows of x, and what
        is there of the norm (where it starts from x), a residual (never) and scales (of int8).

        Raises UsageError where there is no plan.
        """
        layout, packed = self.layouts[stage], getattr(self, stage)
        plan = self._plan(stage, rows.shape[0], rows.dtype, None if norm is None else norm.eps)
        weight = None if norm is None or not layout.hidden else norm.weight
        scales = packed.scale.data if layout.is_int8 else None
        # As each kernel has them: norm_weight, residual, scales; xuv residual, scales; the others
        # norm_weight, scales.
        optional = {"whole": (weight, None, scales), "last": (None, scales)}.get(stage, (weight, scales))
        while optional and optional[-1] is None:
            optional = optional[:-1]
        return packed.weight.data, plan, *optional

    def _plan(self, stage: str, tokens: int, dtype: torch.dtype, norm_eps: float | None) -> Plan:
        if (stage, tokens, norm_eps) not in self.plans:
            plan = plan_launch(_request(self.layouts[stage], tokens, dtype, norm_eps))
            if isinstance(plan, Declined):
                raise UsageError(f"low-rank MLP, launch {stage!r} of {tokens} tokens: {plan.reason}")
            self.plans[stage, tokens, norm_eps] = plan
        return self.plans[stage, tokens, norm_eps]


def _packed_module(layout: Layout, parallel: Parallel) -> nn.Module:
    """A module whose `weight` is this rank's part of the packed weights, and `scale` that of the scales."""
    rows = parallel.size * PMAX
    if layout.is_int8:
        return parallel.int8((rows, layout.packed_cols), OUT, (rows, layout.scale_cols))
    return parallel.column(layout.packed_cols, rows)
