from __future__ import annotations

import itertools

import pytest
import torch

from neuronmlp_plugin.lowrank.removal import eliminate, leverage_order, repaired
from tests.lowrank.small_mlps import down_loss, small_mlp


def with_zeros(mlp, kept: torch.Tensor) -> torch.Tensor:
    """Down of the kept channels, repaired, among all of them."""
    whole = torch.zeros_like(mlp.down)
    whole[:, kept] = repaired(mlp.down, mlp.channels, kept)
    return whole


def test_the_curve_is_what_the_repaired_matrix_loses():
    mlp = small_mlp()
    order, loss = eliminate(mlp.down, mlp.channels, mlp.down_metric, 8)
    assert sorted(order.tolist()) == list(range(48))
    for kept in (47, 40, 24, 8):
        assert float(loss[kept]) == pytest.approx(down_loss(mlp, with_zeros(mlp, order[:kept])), rel=1e-3)
    assert float(loss[48]) == 0.0 and bool(torch.isinf(loss[:8]).all())
    assert bool((loss[8:].diff() <= 1e-12).all())


def test_blocks_change_nothing(monkeypatch):
    mlp = small_mlp(channels=40)
    whole = eliminate(mlp.down, mlp.channels, mlp.down_metric, 5)
    monkeypatch.setattr("neuronmlp_plugin.lowrank.removal.BLOCK", 3)
    order, loss = eliminate(mlp.down, mlp.channels, mlp.down_metric, 5)
    assert order[5:].tolist() == whole[0][5:].tolist() and loss[5:] == pytest.approx(whole[1][5:])


def test_the_first_channel_to_go_is_the_one_that_is_missed_least():
    mlp = small_mlp(channels=12)
    order, loss = eliminate(mlp.down, mlp.channels, mlp.down_metric, 11)
    losses = [
        down_loss(mlp, with_zeros(mlp, torch.tensor([j for j in range(12) if j != gone])))
        for gone in range(12)
    ]
    assert losses.index(min(losses)) == int(order[-1])
    assert float(loss[11]) == pytest.approx(min(losses), rel=1e-4)


def test_elimination_loses_less_than_leverage_and_little_more_than_the_best_choice():
    mlp = small_mlp(hidden=6, channels=10)
    loss = eliminate(mlp.down, mlp.channels, mlp.down_metric, 5)[1]
    choices = (torch.tensor(kept) for kept in itertools.combinations(range(10), 5))
    best = min(down_loss(mlp, with_zeros(mlp, kept)) for kept in choices)
    by_leverage = down_loss(mlp, with_zeros(mlp, leverage_order(mlp.channels, 1e-3)[:5]))
    assert best <= float(loss[5]) * (1 + 1e-4) < 1.5 * best
    assert float(loss[5]) < by_leverage


def test_leverage_follows_its_definition():
    c = small_mlp().channels
    scores = (c @ torch.linalg.inv(c + 0.1 * torch.eye(48, dtype=c.dtype))).diagonal()
    assert leverage_order(c, 0.1).tolist() == scores.argsort(descending=True).tolist()


def test_a_repair_beats_leaving_the_columns_as_they_are():
    mlp = small_mlp()
    kept = torch.arange(30)
    cut = mlp.down.clone()
    cut[:, 30:] = 0
    assert down_loss(mlp, with_zeros(mlp, kept)) < 0.9 * down_loss(mlp, cut)
