"""Every public idea once, in seconds: factorise a toy MLP, store it, load it, serve its mathematics over two
ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.lowrank.decompose import decompose
from neuronmlp_plugin.lowrank.pivots import common_order, pivot_inputs, pivot_outputs
from neuronmlp_plugin.models.gather import GatherDown, GatherGateUp, gather_shard
from tests.thread_group import ThreadGroup
from tests.tiny_models import MIXED_LAYERS, SHAPE, write_dense, write_mixed


@torch.no_grad()
def test_a_low_rank_mlp_from_weights_to_two_ranks(tmp_path):
    torch.manual_seed(0)
    # a matrix of exact rank 9 is found, pivoted with a shared channel order, and nothing is lost
    low = {
        "gate_proj": torch.randn(48, 9) @ torch.randn(9, 20),
        "down_proj": torch.randn(20, 9) @ torch.randn(9, 48),
    }
    gate, down = (decompose(low[name]).truncate(9) for name in low)
    order = common_order([gate[1], down[0].T])
    u, c = pivot_outputs(gate[0], gate[1][order])
    torch.testing.assert_close(torch.cat((u, c @ u)).float(), low["gate_proj"][order], rtol=1e-4, atol=1e-4)
    c, v = pivot_inputs(down[0][:, order], down[1])
    torch.testing.assert_close(
        torch.cat((v, v @ c), 1).float(), low["down_proj"][:, order], rtol=1e-4, atol=1e-4
    )

    # a checkpoint of every form is written, read, and its first MLP runs over two ranks as it does on one
    model = load_model(write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", "llama")))
    mlp = model.model.layers[1].mlp

    def rank(group):
        gate, up, down = (
            gather_shard(matrix, getattr(mlp, name).state_dict(), 2, group.rank)
            for name, matrix in MIXED_LAYERS[1].matrices.items()
        )
        with torch.no_grad():
            g, u = GatherGateUp([gate, up], group)(x).chunk(2, dim=-1)
            return group.all_reduce(GatherDown(down, group)(F.silu(g) * u))

    x = torch.randn(3, SHAPE.hidden_size)
    for y in ThreadGroup(2).run(rank):
        torch.testing.assert_close(y, mlp(x), rtol=1e-4, atol=1e-4)
