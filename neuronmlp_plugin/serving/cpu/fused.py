"""The projections of an MLP, or all of it, as one chain: both products of a low-rank matrix, gate beside up,
and silu between them and down.

Used where a rank owns whole groups of the MLP. Where ranks share one group's factors (models/gather.py) the
stages are parted by collectives, and `gemm.py` serves them.
"""

from __future__ import annotations

import torch

from neuronmlp_plugin.models.definition import Factors, Linear, Weight
from neuronmlp_plugin.models.factors import Matrix
from neuronmlp_plugin.serving.cpu.chain import INPUT, NOWHERE, OUTPUT, Chain, Place

Owned = tuple[Matrix, Factors]
Large = tuple[float, Linear] | None  # from so many tokens on, another way to compute the same


def blocks_of(weight: Weight, blocks: int) -> list[Weight]:
    """The blocks of a stacked factor."""
    scales = [None] * blocks if weight.scale is None else weight.scale.chunk(blocks)
    return [Weight(values, scale) for values, scale in zip(weight.values.chunk(blocks), scales, strict=True)]


def fused_gate_up(gate: Owned, up: Owned, dtype: torch.dtype, large: Large = None) -> Linear:
    """x `[..., H]` -> `[..., 2 k]`, gate first, of the k channels that a rank owns."""
    channels = gate[0].channels
    chain = Chain(gate[0].hidden_size, 2 * channels, dtype)
    for place, owned in ((Place(OUTPUT), gate), (Place(OUTPUT, channels), up)):
        _add_gate_or_up(chain, owned, place)
    return chain.finish(large)


def fused_down(down: Owned, dtype: torch.dtype, large: Large = None) -> Linear:
    """h `[..., k]` -> y `[..., H]`, a summand where a rank owns a share of the channels."""
    chain = Chain(down[0].channels, down[0].hidden_size, dtype)
    _add_down(chain, down, Place(INPUT), 0)
    return chain.finish(large)


def fused_mlp(gate: Owned, up: Owned, down: Owned, dtype: torch.dtype, large: Large = None) -> Chain:
    """x `[..., H]` -> y `[..., H]` of down(silu(gate(x)) * up(x)), a summand where a rank owns a share of the
    channels.
    """
    channels, hidden = gate[0].channels, gate[0].hidden_size
    chain = Chain(hidden, hidden, dtype)
    at_gate, at_up = chain.scratch(channels), chain.scratch(channels)
    _add_gate_or_up(chain, gate, at_gate)
    _add_gate_or_up(chain, up, at_up)
    chain.add_silu(2, channels, at_gate, at_gate, at_up)
    _add_down(chain, down, at_gate, 3)
    return chain.finish(large)


def _add_gate_or_up(chain: Chain, owned: Owned, y: Place) -> None:
    """Stages 0 and 1. A compact matrix's z is written where its pivots belong in the output."""
    matrix, (first, second) = owned
    assert first is not None
    if second is None:
        chain.add(0, first, Place(INPUT), y)
        return
    pairs = zip(blocks_of(first, matrix.groups), blocks_of(second, matrix.groups), strict=True)
    for group, (u, v) in enumerate(pairs):
        mine = y.plus(group * matrix.channels // matrix.groups)
        z = mine if matrix.pivots else chain.scratch(matrix.rank)
        chain.add(0, u, Place(INPUT), z)
        chain.add(1, v, z, mine.plus(matrix.pivots))


def _add_down(chain: Chain, owned: Owned, h: Place, stage: int) -> None:
    """Two stages. The pivots of a compact matrix are the addend of its first product."""
    matrix, (first, second) = owned
    assert second is not None
    if first is None:
        chain.add(stage, second, h, Place(OUTPUT))
        return
    z = chain.scratch(matrix.groups * matrix.rank)
    for group, weight in enumerate(blocks_of(first, matrix.groups)):
        mine = h.plus(group * matrix.channels // matrix.groups)
        addend = mine if matrix.pivots else NOWHERE
        chain.add(stage, weight, mine.plus(matrix.pivots), z.plus(group * matrix.rank), addend)
    chain.add(stage + 1, second, z, Place(OUTPUT))
