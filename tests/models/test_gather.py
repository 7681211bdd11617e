"""Ranks that share the factors of one group equal the plain MLP, for every mix of forms, and ranks that tp
does not divide.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from neuronmlp_plugin.models.gather import Collectives, GatherDown, GatherGateUp, gather_shard
from tests.models.layers import MIXES, RANKS, SHAPE, mix_layer, plain_mlp, random_modules
from tests.thread_group import ThreadGroup


def rank_output(layer, modules, x, collectives: Collectives) -> torch.Tensor:
    tp, rank = collectives.size, collectives.rank
    gate, up, down = (
        gather_shard(matrix, modules[p].state_dict(), tp, rank) for p, matrix in layer.matrices.items()
    )
    gated, raised = GatherGateUp([gate, up], collectives)(x).chunk(2, dim=-1)
    return collectives.all_reduce(GatherDown(down, collectives)(F.silu(gated) * raised))


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@torch.no_grad()
def test_sharded_mlp_equals_the_plain_one(mix, tp):
    layer = mix_layer(mix)
    modules = {p: m.double() for p, m in random_modules(layer).items()}
    x = torch.randn(5, SHAPE.hidden_size, dtype=torch.float64)
    expected = plain_mlp(modules, x)
    for y in ThreadGroup(tp).run(lambda c: torch.no_grad()(rank_output)(layer, modules, x, c)):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_gather_moves_only_ranks_and_the_output():
    layer = mix_layer(("compact", "uv", "compact"))
    modules, group = random_modules(layer), ThreadGroup(2)
    group.run(lambda c: torch.no_grad()(rank_output)(layer, modules, torch.randn(5, SHAPE.hidden_size), c))
    slots = {p: -(-r // 2) for p, r in RANKS.items()}
    tokens_bytes = 5 * 4
    assert group.log == [
        ("all_gather", tokens_bytes * (slots["gate_proj"] + slots["up_proj"])),
        ("reduce_scatter", tokens_bytes * 2 * slots["down_proj"]),
        ("all_reduce", tokens_bytes * SHAPE.hidden_size),
    ]


def test_every_factor_shrinks_by_tp():
    layer = mix_layer(("compact", "compact", "compact"))
    gate = layer.matrix("gate_proj")
    shard = gather_shard(gate, random_modules(layer)["gate_proj"].state_dict(), 2, 1)
    assert shard.first.values.shape == (7, SHAPE.hidden_size)
    assert shard.second.values.shape == (24 - 6, 14)
    assert torch.equal(shard.first.values[6], torch.zeros(SHAPE.hidden_size))
