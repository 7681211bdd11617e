"""The MLP of one rank by NKI kernels: one launch for all of it, or three between the collectives of scheme
`gather`.

NxDI compiles one graph for all ranks, while a rank's pivots sit at its own place in the gathered z. So the z
that a launch gets and gives begins with the rank's own share (`own_first`), its weights are packed for that
order, and the rank is data: NxDI's SPMDRank.
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
from neuronmlp_plugin.models.projection import PROJECTIONS, MLPShape, ProjectionSpec
from neuronmlp_plugin.models.sharding import Weights, slots_per_rank
from neuronmlp_plugin.serving.trainium.layout import even_pivots, lay_out, partition_dim
from neuronmlp_plugin.serving.trainium.parallel import Parallel
from nki_kernels.kernels.sharded import first_factors, last_factor, second_factors
from nki_kernels.kernels.svd_mlp import svd_mlp
from nki_kernels.layout import DENSE, Layout, Projection, first_stage, last_stage, mlp_layout, second_stage
from nki_kernels.packing import pack
from nki_kernels.plan import Plan
from nki_kernels.planner import Declined, Request, plan_launch
from nki_kernels.targets import PMAX

SCHEME = "gather"
_NUMPY_DTYPES = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
Specs = Mapping[str, ProjectionSpec]


def stage_layouts(specs: Specs, shape: MLPShape, tp: int) -> dict[str, Layout]:
    """What each launch computes, by name: `whole`, or `first`, `second` and `last` as far as the forms need
    them.
    """
    projections = [_projection(specs[name], tp) for name in PROJECTIONS]
    whole = mlp_layout(shape.hidden_size, shape.intermediate_size // tp, *projections)
    if tp == 1:
        return {"whole": whole}
    stages = {"second": second_stage(whole)}
    if whole.gate_first or whole.up_first:
        stages["first"] = first_stage(whole)
    if whole.down_first:
        stages["last"] = last_stage(whole)
    return stages


def _projection(spec: ProjectionSpec, tp: int) -> Projection:
    if spec.form == "dense":
        return DENSE
    slots = slots_per_rank(spec.rank or 0, tp)
    return Projection(spec.form, tp * slots, slots, even_pivots(spec, tp, SCHEME))


def turned(specs: Specs) -> tuple[bool, bool]:
    """Whether the z of gate and up, and that of down, travel own share first: only pivots ask for it."""
    return any(specs[name].form == "compact" for name in PROJECTIONS[:2]), specs[
        "down_proj"
    ].form == "compact"


def _request(layout: Layout, tokens: int, dtype: torch.dtype, norm_eps: float | None) -> Request:
    """Between collectives activations travel as [channels, T], so a launch that starts from down's z finds
    its input transposed.
    """
    transposed = layout.down_first is None and layout.gate_second is None and layout.down_second is not None
    return Request(
        layout,
        tokens,
        np.dtype(_NUMPY_DTYPES[dtype]),
        norm_eps if layout.hidden else None,
        transposed_input=transposed,
    )


def declined(specs: Specs, shape: MLPShape, tp: int, dtype: torch.dtype) -> str | None:
    """Why the planner has no plan for the layer, in a sentence, or None. What fits 128 tokens fits any
    number, block by block.
    """
    for layout in stage_layouts(specs, shape, tp).values():
        plan = plan_launch(_request(layout, PMAX, dtype, norm_eps=1e-5))
        if isinstance(plan, Declined):
            return plan.reason
    return None


def pack_layer(
    specs: Specs, weights: Mapping[str, Weights], shape: MLPShape, tp: int
) -> dict[str, torch.Tensor]:
    """Launch -> packed weights `[tp 128, C]`, whose contiguous slices are the ranks', from each projection's
    tensors of FORMAT.md.
    """
    whole = {name: lay_out(name, specs[name], weights[name], tp, SCHEME) for name in PROJECTIONS}
    dtype = next(iter(weights["down_proj"].values())).dtype
    packed: dict[str, list[torch.Tensor]] = {stage: [] for stage in stage_layouts(specs, shape, tp)}
    for rank in range(tp):
        matrices = _rank_matrices(specs, whole, tp, rank)
        for stage, layout in stage_layouts(specs, shape, tp).items():
            mine = {name: matrix for name, matrix in matrices.items() if layout.matrix(name) is not None}
            packed[stage].append(pack(layout, mine, torch.zeros(PMAX, layout.packed_cols, dtype=dtype)))
    return {stage: torch.cat(slices) for stage, slices in packed.items()}


def _rank_matrices(specs: Specs, whole: Mapping[str, Weights], tp: int, rank: int) -> dict[str, torch.Tensor]:
    """One rank's matrices `[out, in]` by the names that `nki_kernels.layout` gives them, with z in own-first
    order.
    """
    matrices = {}
    for name in PROJECTIONS:
        short, down = name.removesuffix("_proj"), name == "down_proj"
        parts = {
            part: t.chunk(tp, partition_dim(name, part, SCHEME))[rank] for part, t in whole[name].items()
        }
        if specs[name].form == "dense":
            (matrices[f"{short}_second"],) = parts.values()
            continue
        if turned(specs)[down]:
            z_part, dim = ("first", 0) if down else ("second", 1)
            slots = parts[z_part].shape[dim] // tp
            parts[z_part] = parts[z_part].roll(-rank * slots, dims=dim)
        matrices |= {f"{short}_{part}": matrix for part, matrix in parts.items()}
    return matrices


def own_first(z: torch.Tensor, rank: torch.Tensor, tp: int) -> torch.Tensor:
    """Rank-major z `[tp n, T]` -> the same with the share of `rank` `[1]` first, then those of rank + 1, ...
    around the ring.
    """
    order = (torch.arange(tp, device=z.device) + rank) % tp
    return z.reshape(tp, -1, z.shape[-1]).index_select(0, order).reshape(z.shape)


def rank_major(z: torch.Tensor, rank: torch.Tensor, tp: int) -> torch.Tensor:
    """The inverse of `own_first`."""
    return own_first(z, -rank, tp)


def call(kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Launch a kernel on the tensors as they are: inside NxDI's trace, `nki.jit` makes it part of the graph."""
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
    tiles = F.pad(weight.float(), (0, -weight.shape[0] % PMAX)).reshape(-1, PMAX)
    return tiles.t().contiguous()


class KernelPath(nn.Module):
    """One rank's packed weights, and the launches that read them."""

    launch: Callable[..., Any] = staticmethod(call)

    def __init__(self, specs: Specs, shape: MLPShape, parallel: Parallel) -> None:
        super().__init__()
        self.layouts = stage_layouts(specs, shape, parallel.size)
        self.slots = tuple(_projection(specs[name], parallel.size).slots for name in PROJECTIONS[:2])
        self.turn_z, self.turn_down = turned(specs)
        self.parallel = parallel
        for stage, layout in self.layouts.items():
            self.add_module(stage, parallel.column(layout.packed_cols, parallel.size * PMAX))
        self.rank = parallel.rank_module() if parallel.size > 1 else None
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
        return self.launch(svd_mlp, rows, *self._rest("whole", rows.shape[0], norm))

    def _between_collectives(self, rows: torch.Tensor, norm: Norm | None, rank: torch.Tensor) -> torch.Tensor:
        tp, tokens = self.parallel.size, rows.shape[0]
        z = None
        if "first" in self.layouts:
            z = self.launch(first_factors, rows, *self._rest("first", tokens, norm))
            z = self.parallel.gather(z, 0)
            z = own_first(z, rank, tp) if self.turn_z else z
        needs_x = rows if self.layouts["second"].hidden else None
        out = self.launch(second_factors, needs_x, z, self.slots, *self._rest("second", tokens, norm))
        if "last" not in self.layouts:
            return out
        z = self.parallel.scatter_sum(rank_major(out, rank, tp) if self.turn_down else out, 0)
        return self.launch(last_factor, z, *self._rest("last", tokens, norm))

    def _rest(self, stage: str, tokens: int, norm: Norm | None) -> tuple[Any, ...]:
        """A launch's further arguments: packed weights, the plan for as many tokens, and the norm where it
        starts from x.

        Raises UsageError where there is no plan.
        """
        layout, weights = self.layouts[stage], getattr(self, stage).weight.data
        eps = None if norm is None else norm.eps
        if (stage, tokens, eps) not in self.plans:
            plan = plan_launch(_request(layout, tokens, weights.dtype, eps))
            if isinstance(plan, Declined):
                raise UsageError(f"low-rank MLP, launch {stage!r} of {tokens} tokens: {plan.reason}")
            self.plans[stage, tokens, eps] = plan
        rest = (weights, self.plans[stage, tokens, eps])
        return rest if norm is None or not layout.hidden else (*rest, norm.weight)
