"""Rounding that makes up for itself: never worse where nothing is shared, and clearly better where much is."""

from __future__ import annotations

import pytest
import torch

from neuronmlp_plugin.lowrank import rounding
from neuronmlp_plugin.lowrank.rounding import grams, refit, round_under

LIMIT = 127


def case(rows=40, rank=90, width=70, seed=0):
    """A weight `[rows, rank]`, its steps, and the Gram matrix of a factor whose rows are alike."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, rank, generator=generator)
    factor = torch.randn(rank, width, generator=generator) + 2 * torch.randn(1, width, generator=generator)
    return weight, weight.abs().amax(1, keepdim=True) / LIMIT, factor @ factor.T


def loss(weight, rounded, gram):
    lost = (weight - rounded).double()
    return float((lost @ gram.double() * lost).sum())


def plain(weight, step):
    return (weight / step).round().clamp(-LIMIT, LIMIT)


def test_under_a_diagonal_gram_it_is_plain_rounding():
    weight, step, _ = case()
    assert torch.equal(
        round_under(weight, step, torch.diag(torch.rand(90) + 0.1), LIMIT), plain(weight, step)
    )


@pytest.mark.parametrize("seed", range(3))
def test_under_a_shared_direction_it_loses_less_than_half(seed):
    weight, step, gram = case(seed=seed)
    q = round_under(weight, step, gram, LIMIT)
    assert torch.equal(q, q.round()) and float(q.abs().max()) <= LIMIT
    assert loss(weight, q * step, gram) < 0.5 * loss(weight, plain(weight, step) * step, gram)


def test_blocks_change_nothing(monkeypatch):
    weight, step, gram = case()
    whole = loss(weight, round_under(weight, step, gram, LIMIT) * step, gram)
    monkeypatch.setattr(rounding, "BLOCK", 1)
    assert loss(weight, round_under(weight, step, gram, LIMIT) * step, gram) == pytest.approx(whole, rel=0.02)


def test_steps_may_go_with_the_columns_and_be_zero():
    weight, _, gram = case()
    weight[:, 3] = 0
    step = weight.abs().amax(0) / LIMIT
    q = round_under(weight, step, gram, LIMIT)
    assert loss(weight, q * step, gram) < loss(
        weight, (weight / step.where(step > 0, 1.0)).round() * step, gram
    )


@pytest.mark.parametrize("pivoted", [False, True])
def test_refit_is_the_least_squares_solution(pivoted):
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(9, 30, generator=generator).double(),
        torch.randn(20, 9, generator=generator).double(),
    )
    moved = first + 0.1 * torch.randn(9, 30, generator=generator)
    unit = torch.eye(9, dtype=torch.float64)
    before, after = (torch.cat((unit, f), 1) if pivoted else f for f in (first, moved))
    gram, cross = grams(first, moved, pivoted)
    expected = torch.linalg.lstsq(after.T, (second @ before).T).solution.T
    torch.testing.assert_close(refit(second, cross, gram), expected, rtol=1e-3, atol=1e-4)
