"""Sharded MLPs equal the plain one, for every mix of forms, every scheme, and ranks that tp does not divide."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.models.collectives import Collectives
from neuronmlp_plugin.models.parallel_mlp import Down, GateUp
from neuronmlp_plugin.models.sharding import check_divisible, shard_down, shard_gate_up
from tests.models.layers import MIXES, RANKS, SHAPE, mix_specs, plain_mlp, random_modules
from tests.thread_group import ThreadGroup


def rank_output(specs, modules, x, collectives: Collectives, scheme: str) -> torch.Tensor:
    weights = {p: module.state_dict() for p, module in modules.items()}
    tp, rank = collectives.size, collectives.rank
    shards = [shard_gate_up(specs[p], weights[p], tp, rank, scheme) for p in ("gate_proj", "up_proj")]
    gate, up = GateUp(shards, SHAPE.intermediate_size, collectives, scheme)(x).chunk(2, dim=-1)
    partial = Down(
        shard_down(specs["down_proj"], weights["down_proj"], tp, rank, scheme), collectives, scheme
    )(F.silu(gate) * up)
    return collectives.all_reduce(partial)


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("scheme", ["gather", "reduce"])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@torch.no_grad()
def test_sharded_mlp_equals_the_plain_one(mix, scheme, tp):
    specs = mix_specs(mix)
    modules = {p: m.double() for p, m in random_modules(specs).items()}
    x = torch.randn(5, SHAPE.hidden_size, dtype=torch.float64)
    expected = plain_mlp(modules, x)
    with torch.no_grad():
        for y in ThreadGroup(tp).run(lambda c: torch.no_grad()(rank_output)(specs, modules, x, c, scheme)):
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def collectives_of(scheme: str) -> list[tuple[str, int]]:
    specs = mix_specs(("compact", "uv", "compact"))
    modules = random_modules(specs)
    group = ThreadGroup(2)
    group.run(
        lambda c: torch.no_grad()(rank_output)(specs, modules, torch.randn(5, SHAPE.hidden_size), c, scheme)
    )
    return group.log


def test_gather_moves_only_ranks_and_the_output():
    slots = {p: -(-r // 2) for p, r in RANKS.items()}
    tokens_bytes = 5 * 4
    assert collectives_of("gather") == [
        ("all_gather", tokens_bytes * (slots["gate_proj"] + slots["up_proj"])),
        ("reduce_scatter", tokens_bytes * 2 * slots["down_proj"]),
        ("all_reduce", tokens_bytes * SHAPE.hidden_size),
    ]


def test_reduce_moves_both_whole_activations():
    assert collectives_of("reduce") == [
        ("all_reduce", 5 * 4 * 2 * SHAPE.intermediate_size),
        ("all_reduce", 5 * 4 * SHAPE.hidden_size),
    ]


def test_every_factor_shrinks_by_tp_under_gather():
    specs = mix_specs(("compact", "compact", "compact"))
    weights = {p: m.state_dict() for p, m in random_modules(specs).items()}
    shard = shard_gate_up(specs["gate_proj"], weights["gate_proj"], 2, 1)
    assert shard.first.shape == (7, SHAPE.hidden_size)
    assert shard.second.shape == (24 - 6, 14)
    assert torch.equal(shard.first[6], torch.zeros(SHAPE.hidden_size))


@pytest.mark.parametrize(("size", "tp", "scheme"), [(48, 5, "gather"), (48, 2, "replicate")])
def test_what_cannot_be_dealt_out_is_refused(size, tp, scheme):
    with pytest.raises(UsageError, match="expected"):
        check_divisible(size, tp, scheme)
