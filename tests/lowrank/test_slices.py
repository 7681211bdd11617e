from __future__ import annotations

import pytest
import torch

from neuronmlp_plugin.lowrank.decompose import decompose
from neuronmlp_plugin.lowrank.slices import factor_inputs, factor_outputs
from tests.lowrank.small_mlps import down_loss, small_mlp

GROUPS = [torch.arange(t, 48, 4) for t in range(4)]


def joined(pairs, groups) -> torch.Tensor:
    """Down `[H, I]` of its slices."""
    whole = torch.zeros(24, 48, dtype=torch.float64)
    for group, (first, second) in zip(groups, pairs, strict=True):
        whole[:, group] = second @ first
    return whole


def test_the_tails_of_gate_are_what_its_slices_lose():
    mlp = small_mlp()
    tail = mlp.tails(GROUPS)[0]
    lost = 0.0
    for group, (first, second) in zip(
        GROUPS, factor_outputs(mlp.gate, mlp.inputs, mlp.gate_metric, GROUPS, 7), strict=True
    ):
        error = mlp.gate[group] - second @ first
        lost += float((mlp.gate_metric[group, None] * error @ mlp.inputs * error).sum())
    assert float(tail[7]) == pytest.approx(lost, rel=1e-3) and float(tail[-1]) == 0.0


def test_the_tails_of_down_are_what_its_slices_lose_alone():
    mlp = small_mlp()
    lost = 0.0
    for group in GROUPS:
        c, w = mlp.channels[group][:, group], mlp.down[:, group]
        first, second = decompose(w, c, mlp.down_metric).truncate(7)
        error = w - second @ first
        lost += float((mlp.down_metric @ error @ c * error).sum())
    assert float(mlp.tails(GROUPS)[2][7]) == pytest.approx(lost, rel=1e-3)


def test_a_refit_of_all_groups_together_loses_less_than_each_alone():
    mlp = small_mlp()
    alone = [decompose(mlp.down[:, g], mlp.channels[g][:, g], mlp.down_metric).truncate(6) for g in GROUPS]
    together = factor_inputs(mlp.down, mlp.channels, mlp.down_metric, GROUPS, 6)
    assert [tuple(first.shape) for first, _ in together] == [(6, 12)] * 4
    assert down_loss(mlp, joined(together, GROUPS)) < 0.95 * down_loss(mlp, joined(alone, GROUPS))


def test_no_other_second_factors_do_better():
    """What the refit says of itself: at its factors the gradient by every second factor is nothing."""
    mlp = small_mlp()
    pairs = factor_inputs(mlp.down, mlp.channels, mlp.down_metric, GROUPS, 6)
    error = mlp.down - joined(pairs, GROUPS)
    slope = mlp.down_metric @ error @ mlp.channels
    scale = float((mlp.down_metric @ mlp.down @ mlp.channels).norm())
    for group, (first, _) in zip(GROUPS, pairs, strict=True):
        assert float((slope[:, group] @ first.T).norm()) < 1e-5 * scale * float(first.norm())


def test_one_group_is_the_plain_decomposition():
    mlp, whole = small_mlp(), [torch.arange(48)]
    ((first, second),) = factor_inputs(mlp.down, mlp.channels, mlp.down_metric, whole, 10)
    exact = decompose(mlp.down, mlp.channels, mlp.down_metric).truncate(10)
    assert torch.allclose(second @ first, exact[1] @ exact[0])


def test_removed_channels_and_a_rank_lose_the_sum_of_what_they_lose_apart():
    from neuronmlp_plugin.lowrank.removal import eliminate

    mlp = small_mlp()
    order, removal = eliminate(mlp.down, mlp.channels, mlp.down_metric, 24)
    kept = order[:32].sort().values
    slim = mlp.keep(kept)
    first, second = decompose(slim.down, slim.channels, slim.down_metric).truncate(9)
    whole = torch.zeros_like(mlp.down)
    whole[:, kept] = second @ first
    tail = float(slim.tails([torch.arange(32)])[2][9])
    assert down_loss(mlp, whole) == pytest.approx(float(removal[32]) + tail, rel=1e-3)


def test_channels_that_stay_matter_more_after_the_repair():
    mlp = small_mlp()
    kept = torch.arange(20)
    slim = mlp.keep(kept)
    before = (mlp.down[:, kept] * (mlp.down_metric @ mlp.down[:, kept])).sum(0)
    after = (slim.down * (slim.down_metric @ slim.down)).sum(0)
    assert torch.allclose(slim.gate_metric, mlp.gate_metric[kept] * after / before)
    assert torch.equal(mlp.keep(torch.arange(48)).down, mlp.down)
