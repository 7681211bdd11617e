from __future__ import annotations

import pytest
import torch

from neuronmlp_plugin.lowrank.pivots import common_order, pivot_inputs, pivot_outputs


def factors(out: int, rank: int, n_in: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, n_in, generator=g, dtype=torch.float64), torch.randn(
        out, rank, generator=g, dtype=torch.float64
    )


def plain_greedy(bases) -> list[int]:
    """One row at a time: the largest summed log residual norm over the bases that still need pivots, then
    deflate them all.
    """
    qs = [torch.linalg.qr(b.double()).Q for b in bases]
    left, taken, order = [q.clone() for q in qs], [0] * len(qs), []
    while any(t < b.shape[1] for t, b in zip(taken, bases, strict=True)):
        needy = [i for i, b in enumerate(bases) if taken[i] < b.shape[1]]
        score = sum(left[i].square().sum(1).clamp_min(1e-300).log() for i in needy)
        score[order] = -torch.inf
        best = int(score.argmax())
        order.append(best)
        for i in needy:
            row = left[i][best] / left[i][best].norm()
            left[i] = left[i] - torch.outer(left[i] @ row, row)
            taken[i] += 1
    return order


@pytest.mark.parametrize("ranks", [(9, 9, 9), (12, 5, 8), (30, 1, 17)])
def test_batched_order_is_the_plain_greedys(ranks):
    bases = [torch.randn(60, r, generator=torch.Generator().manual_seed(r + i)) for i, r in enumerate(ranks)]
    order = common_order(bases)
    assert order[: max(ranks)].tolist() == plain_greedy(bases)
    assert sorted(order.tolist()) == list(range(60))


def test_more_channels_than_candidates_give_the_same_order():
    bases = [torch.randn(700, r, generator=torch.Generator().manual_seed(r)) for r in (90, 60)]
    assert common_order(bases)[:90].tolist() == plain_greedy(bases)


def test_common_pivots_keep_c_small_where_random_ones_do_not():
    rank = 40
    pairs = [factors(96, rank, 64, seed) for seed in range(3)]
    order = common_order([second for _, second in pairs])
    chosen = max(float(pivot_outputs(first, second[order])[1].abs().max()) for first, second in pairs)
    random = max(float(pivot_outputs(first, second)[1].abs().max()) for first, second in pairs)
    assert chosen < 6 < random


def test_output_pivots_are_lossless():
    first, second = factors(20, 7, 12)
    u, c = pivot_outputs(first, second)
    assert u.shape == (7, 12) and c.shape == (13, 7)
    torch.testing.assert_close(torch.cat((torch.eye(7, dtype=torch.float64), c)) @ u, second @ first)


def test_input_pivots_are_lossless():
    first, second = factors(12, 7, 20)
    c, v = pivot_inputs(first, second)
    assert c.shape == (7, 13) and v.shape == (12, 7)
    torch.testing.assert_close(v @ torch.cat((torch.eye(7, dtype=torch.float64), c), 1), second @ first)
