"""What each form computes: the definition, in plain torch, that every faster implementation must equal; and
int8.

int8 is symmetric with one scale per output channel and without zero points: w = q scale (FORMAT.md, "int8").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from neuronmlp_plugin.models.factors import OUT, PROJECTIONS, SCALE, Matrix, MLPLayer

LIMIT = 127  # -128 is left out, so that -w is stored as exactly as w
Linear = Callable[[torch.Tensor], torch.Tensor]
Tensors = Mapping[str, torch.Tensor]  # of one matrix, by suffix: what FORMAT.md stores for it


def scales_of(weight: torch.Tensor) -> torch.Tensor:
    """`[out, in]` -> fp32 `[out]`: a channel's largest magnitude over 127, so that nothing is clipped; 0 for
    a channel of zeros.
    """
    return weight.float().abs().amax(dim=1) / LIMIT


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[out, in]` of any floating dtype -> q int8 `[out, in]` and scale fp32 `[out]` with |weight - q scale|
    <= scale / 2.
    """
    scale = scales_of(weight)
    steps = weight.float() / scale.where(scale > 0, 1.0)[:, None]
    # The clamp has work only where the scale is subnormal, so a few bits wide, and may have been rounded
    # down.
    return steps.round().clamp(-LIMIT, LIMIT).to(torch.int8), scale


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 matrix `[out, in]` that q int8 `[out, in]` and scale fp32 `[out]` stand for."""
    return q.float() * scale[:, None]


class Weight(NamedTuple):
    """`values` `[out, in]`, floating point, or int8 with fp32 `scale` `[out]`."""

    values: torch.Tensor
    scale: torch.Tensor | None = None

    def expanded(self) -> torch.Tensor:
        """The floating-point weight that it stands for."""
        return self.values if self.scale is None else dequantize(self.values, self.scale)

    def rearranged(self, change: Callable[[torch.Tensor], torch.Tensor], dim: int) -> Weight:
        """Rows (OUT) or columns (IN) chosen, moved or padded by `change`; scales go with the rows."""
        if self.scale is None or dim != OUT:
            return Weight(change(self.values), self.scale)
        return Weight(change(self.values), change(self.scale))


def joined(parts: Sequence[Weight], dim: int) -> Weight:
    """Parts of one weight side by side along `dim`: scales with the rows (OUT), or those that all share
    (IN).
    """
    values = torch.cat([part.values for part in parts], dim)
    scales = [part.scale for part in parts if part.scale is not None]
    if not scales:
        return Weight(values)
    return Weight(values, torch.cat(scales) if dim == OUT else scales[0])


class Factors(NamedTuple):
    """The numbers of a matrix, or of a rank's share of it, without the letters; None for what it has not."""

    first: Weight | None
    second: Weight | None


def factors_of(matrix: Matrix, tensors: Tensors) -> Factors:
    """From tensors by suffix; int8 stays int8 where its scales are among them."""
    return Factors(
        *(
            Weight(tensors[suffix], tensors.get(suffix + SCALE)) if suffix else None
            for suffix in matrix.suffixes
        )
    )


def tensors_of(
    matrix: Matrix, first: Weight | torch.Tensor | None, second: Weight | torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The way back: tensors by suffix, scales included. `first` and `second` are plain tensors or Weights."""
    tensors = {}
    for suffix, factor in zip(matrix.suffixes, (first, second), strict=True):
        assert bool(suffix) == (factor is not None), (matrix, suffix)
        if factor is not None:
            weight = factor if isinstance(factor, Weight) else Weight(factor)
            tensors[suffix] = weight.values
            if weight.scale is not None:
                tensors[suffix + SCALE] = weight.scale
    return tensors


def share_of(matrix: Matrix, tensors: Tensors, tp: int, rank: int) -> dict[str, torch.Tensor]:
    """What `rank` owns of a matrix whose layer fits tp: a contiguous part of each tensor, views of the whole.
    Scales go with the rows.
    """
    share = {}
    for name, tensor in tensors.items():
        dim = matrix.split_dim(name.removesuffix(SCALE))
        # Down's second factor is cut along its columns: each rank makes a summand of every output, so needs
        # all scales.
        whole = dim != OUT and name.endswith(SCALE)
        share[name] = tensor if whole else tensor.chunk(tp, dim)[rank]
    return share


def plain_linear(weight: torch.Tensor, blocks: int = 1) -> Linear:
    """`x -> block_product(x, weight, blocks)`; what a serving engine's prepacked product must equal."""
    return lambda x: block_product(x, weight, blocks)


def block_product(x: torch.Tensor, weight: torch.Tensor, blocks: int = 1) -> torch.Tensor:
    """x `[..., b m]`, weight `[b n, m]` -> `[..., b n]`: part t of x meets rows t n ... of the weight. With
    one block this is x weight^T; with more, x times the block-diagonal matrix that the weight stands for: the
    sum of the first two, and the difference of the others.

    >>> x, weight = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    >>> block_product(x, weight, blocks=2).tolist()
    [3.0, -1.0]
    """
    if blocks == 1:
        return F.linear(x, weight)
    parts, by_block = x.unflatten(-1, (blocks, -1)), weight.unflatten(0, (blocks, -1))
    return torch.einsum("...bm,bnm->...bn", parts, by_block).flatten(-2)


def product(matrix: Matrix, first: Linear | None, second: Linear | None, x: torch.Tensor) -> torch.Tensor:
    """y `[..., out]` of x `[..., in]`, where `first` and `second` multiply by the matrix's factors.

    z is `first` of x; y is `second` of z. Of a compact gate or up each group's z is also its first channels
    of y; of a compact down the pivots of each group pass into z as they are, and `first` sees the others: of
    rank 1, z = 10 + 3 x 1 - 2 x 5 and y = 2 z.

    >>> from neuronmlp_plugin.models.factors import ProjectionSpec
    >>> down = Matrix("down_proj", ProjectionSpec("compact", 1), hidden_size=1, channels=3)
    >>> first, second = (plain_linear(torch.tensor(rows)) for rows in ([[3.0, -2.0]], [[2.0]]))
    >>> product(down, first, second, torch.tensor([10.0, 1.0, 5.0])).tolist()
    [6.0]
    """
    if first is None or second is None:
        only = first or second
        assert only is not None
        return only(x)
    if not matrix.pivots:
        return second(first(x))
    if matrix.is_down:
        groups = x.unflatten(-1, (matrix.groups, -1))
        pivots, others = groups[..., : matrix.pivots], groups[..., matrix.pivots :]
        # Both in the order of z: R of each group, group after group.
        return second(pivots.flatten(-2) + first(others.flatten(-2)))
    z = first(x)
    # Inside each group, z before what `second` makes of it: the group's pivots are its first channels.
    parts = (part.unflatten(-1, (matrix.groups, -1)) for part in (z, second(z)))
    return torch.cat(tuple(parts), dim=-1).flatten(-2)


def bind(
    matrix: Matrix, factors: Factors, make_linear: Callable[[torch.Tensor, int], Linear] = plain_linear
) -> Linear:
    """`x -> y` for these numbers, through an engine's own way to multiply (`make_linear(weight, blocks)`)."""
    first, second = (
        None if factor is None else make_linear(factor.expanded(), blocks)
        for factor, blocks in zip(factors, matrix.blocks, strict=True)
    )
    return lambda x: product(matrix, first, second, x)


def mlp(layer: MLPLayer, tensors: Mapping[str, Tensors], x: torch.Tensor) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))`, x and y `[..., H]`; `tensors[projection][suffix]`, scales among them
    where int8.
    """
    gate, up, down = (bind(layer.matrix(p), factors_of(layer.matrix(p), tensors[p])) for p in PROJECTIONS)
    return down(F.silu(gate(x)) * up(x))


class BlockLinear(nn.Module):
    """A factor of several groups: `weight` `[b n, m]`, x `[..., b m]` -> `[..., b n]` (`block_product`).

    No `nn.Linear`, so that an adapter for one refuses it instead of multiplying whole rows of x.
    """

    def __init__(self, columns: int, rows: int, blocks: int) -> None:
        super().__init__()
        self.weight, self.blocks = nn.Parameter(torch.empty(rows, columns)), blocks
        bound = columns**-0.5  # nn.Linear's; whatever stood in memory may be NaN
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return block_product(x, self.weight, self.blocks)


class StoredLinear(nn.Module):
    """A low-rank matrix in the place of a projection's `nn.Linear`: x `[..., in]` -> `[..., out]`, with a
    child of the letter of each factor, so that `state_dict` keys are exactly the suffixes of FORMAT.md.
    """

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix
        for suffix, blocks in zip(matrix.suffixes, matrix.blocks, strict=True):
            rows, columns = matrix.tensor_shapes()[suffix]
            child = (
                nn.Linear(columns, rows, bias=False) if blocks == 1 else BlockLinear(columns, rows, blocks)
            )
            self.add_module(suffix.removesuffix(".weight"), child)

    @property
    def in_features(self) -> int:
        return self.matrix.in_out[0]

    @property
    def out_features(self) -> int:
        return self.matrix.in_out[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The children are called, not their weights read: an adapter may have taken the place of one.
        first, second = (getattr(self, suffix.removesuffix(".weight")) for suffix in self.matrix.suffixes)
        return product(self.matrix, first, second, x)


def build_linear(matrix: Matrix) -> nn.Module:
    """A module of random numbers whose `state_dict` keys are the tensor suffixes of FORMAT.md."""
    n_in, n_out = matrix.in_out
    return StoredLinear(matrix) if matrix.spec.is_low_rank else nn.Linear(n_in, n_out, bias=False)
