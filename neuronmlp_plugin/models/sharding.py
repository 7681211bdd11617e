"""Which slice of each projection a tensor-parallel rank owns. Tensors in, tensors out; no process group.

Scheme `gather` (default) shards both the rank dimension R and the intermediate channels, so that every factor
shrinks by tp. Scheme `reduce` shards R alone and keeps whole activations: simpler, dearer, the reference
(collectives: see `models/parallel_mlp.py`).

Channels and ranks are dealt out cyclically: rank t of tp owns t, t + tp, t + 2 tp, ... With the pivots first
(FORMAT.md) every rank owns an equal share of pivots and of the rest, and the slice of z that it computes for
an output-pivoted matrix IS its slice of the output. Where tp does not divide R, each rank has ceil(R / tp)
slots and the unused ones hold zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.models.projection import SCALE, ProjectionSpec

SCHEMES = ("gather", "reduce")
Weights = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One rank's part of a projection, in Linear layout `[out, in]`.

    `first` is what meets the input and `second` what makes the output; a `dense` matrix has only `first`
    (gate, up) or only `second` (down). `pivots`: how many local channels are pivots, i.e. are themselves z (0
    unless `compact`). `slots`: length of the local z.
    `scales`: of `first` and `second`, fp32 `[out]`, where they are int8, which only `whole_shard` leaves
    them.
    """

    form: str
    first: torch.Tensor | None
    second: torch.Tensor | None
    pivots: int = 0
    slots: int = 0
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)


def slots_per_rank(count: int, tp: int) -> int:
    """ceil(count / tp): how long a rank's share of `count` dealt-out things can be."""
    return -(-count // tp)


def deal(x: torch.Tensor, tp: int, rank: int, dim: int) -> torch.Tensor:
    """The share `rank::tp` of `x` along `dim`."""
    return x[rank::tp] if dim == 0 else x[:, rank::tp]


def deal_padded(x: torch.Tensor, tp: int, rank: int, dim: int) -> torch.Tensor:
    """As `deal`, with zeros up to `slots_per_rank`."""
    share = deal(x, tp, rank, dim)
    missing = slots_per_rank(x.shape[dim], tp) - share.shape[dim]
    return F.pad(share, (0, 0, 0, missing) if dim == 0 else (0, missing))


def gathered_order(x: torch.Tensor, tp: int, dim: int) -> torch.Tensor:
    """`x` along `dim` in the order in which an all-gather of dealt-out shares delivers it, padding included."""
    return torch.cat([deal_padded(x, tp, rank, dim) for rank in range(tp)], dim=dim)


def check_divisible(intermediate_size: int, tp: int, scheme: str) -> None:
    """Refuse what cannot be dealt out evenly; raises UsageError."""
    if scheme not in SCHEMES:
        raise UsageError(f"tp_scheme: expected {' or '.join(SCHEMES)}, found {scheme!r}.")
    if intermediate_size % tp:
        raise UsageError(
            f"tensor parallel size {tp}: expected a divisor of the intermediate size {intermediate_size}; choose another."
        )


def _dealt_rest(c: torch.Tensor, rank_r: int, tp: int, rank: int, dim: int) -> torch.Tensor:
    """The rows (columns) of `c` for the channels R, R + 1, ... that `rank` owns; channel R + j belongs to
    rank (R + j) % tp.
    """
    start = (rank - rank_r) % tp
    return c[start::tp] if dim == 0 else c[:, start::tp]


def shard_gate_up(
    spec: ProjectionSpec, weights: Weights, tp: int, rank: int, scheme: str = "gather"
) -> Shard:
    """Share of a gate or up projection; `weights` maps the suffixes of FORMAT.md to full tensors."""
    if spec.form == "dense":
        return Shard("dense", deal(weights["weight"], tp, rank, 0), None)
    u = weights["u.weight"]
    count = u.shape[0]
    pivots = deal(u, tp, rank, 0).shape[0] if spec.form == "compact" else 0
    second = weights["v.weight" if spec.form == "uv" else "c.weight"]
    if scheme == "reduce":
        return Shard(
            spec.form, deal(u, tp, rank, 0), deal(second, tp, rank, 1), pivots, slots_per_rank(count, tp)
        )
    rows = deal(second, tp, rank, 0) if spec.form == "uv" else _dealt_rest(second, count, tp, rank, 0)
    return Shard(
        spec.form, deal_padded(u, tp, rank, 0), gathered_order(rows, tp, 1), pivots, slots_per_rank(count, tp)
    )


def shard_down(spec: ProjectionSpec, weights: Weights, tp: int, rank: int, scheme: str = "gather") -> Shard:
    """Share of a down projection; its output is always a partial sum `[..., H]` for the caller to all-reduce."""
    if spec.form == "dense":
        return Shard("dense", None, deal(weights["weight"], tp, rank, 1))
    v = weights["v.weight"]
    count = v.shape[1]
    first = weights["u.weight" if spec.form == "uv" else "c.weight"]
    pivots = deal(v, tp, rank, 1).shape[1] if spec.form == "compact" else 0
    if scheme == "reduce":
        return Shard(
            spec.form, deal(first, tp, rank, 0), deal(v, tp, rank, 1), pivots, slots_per_rank(count, tp)
        )
    columns = deal(first, tp, rank, 1) if spec.form == "uv" else _dealt_rest(first, count, tp, rank, 1)
    return Shard(
        spec.form,
        gathered_order(columns, tp, 0),
        deal_padded(v, tp, rank, 1),
        pivots,
        slots_per_rank(count, tp),
    )


def whole_shard(projection: str, spec: ProjectionSpec, weights: Weights) -> Shard:
    """What a lone rank owns, which is all. An int8 weight stays int8, and its scales are expected in
    `weights` too.
    """
    down = projection == "down_proj"
    shard = (shard_down if down else shard_gate_up)(spec, weights, 1, 0)
    if spec.form == "dense":
        names = ("", "weight") if down else ("weight", "")
    elif spec.form == "uv":
        names = ("u.weight", "v.weight")
    else:
        names = ("c.weight", "v.weight") if down else ("u.weight", "c.weight")
    return dataclasses.replace(shard, scales=(weights.get(names[0] + SCALE), weights.get(names[1] + SCALE)))
