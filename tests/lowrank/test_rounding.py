"""Rounding that makes up for itself: never worse where nothing is shared, and clearly better where much
is.
"""

from __future__ import annotations

import pytest
import torch

from neuronmlp_plugin.lowrank import rounding
from neuronmlp_plugin.lowrank.rounding import refit, round_under

LIMIT = 127


def shared(size, seed):
    """A Gram matrix of `size` rows that are alike."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, size, generator=generator) + 2 * torch.randn(1, size, generator=generator)
    return (rows @ rows.T).double()


def case(seed=0, rows=40, columns=90):
    """A weight, its steps by row, and Gram matrices of its inputs and outputs."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    step = weight.abs().amax(1, keepdim=True) / LIMIT
    return weight, step, shared(columns, seed), shared(rows, seed + 1)


def loss(weight, rounded, inputs, outputs):
    lost = (weight - rounded).double()
    return float((outputs @ lost @ inputs * lost).sum())


def plain(weight, step):
    return (weight / step).round().clamp(-LIMIT, LIMIT)


def test_where_nothing_is_shared_it_is_plain_rounding():
    weight, step, *_ = case()
    diagonals = [torch.diag(torch.rand(size) + 0.1) for size in (90, 40)]
    for inputs, outputs in ((None, None), diagonals):
        assert torch.equal(round_under(weight, step, LIMIT, inputs, outputs), plain(weight, step))


@pytest.mark.parametrize("seed", range(3))
def test_each_shared_side_more_than_halves_the_loss(seed):
    weight, step, inputs, outputs = case(seed)
    sides = ((None, None), (inputs, None), (None, outputs), (inputs, outputs))
    rounded = [round_under(weight, step, LIMIT, *side) for side in sides]
    assert all(torch.equal(q, q.round()) and float(q.abs().max()) <= LIMIT for q in rounded)
    neither, by_inputs, by_outputs, both = (loss(weight, q * step, inputs, outputs) for q in rounded)
    assert max(by_inputs, by_outputs) < 0.5 * neither and both < 0.5 * min(by_inputs, by_outputs)


def test_it_is_error_feedback_over_the_whole_matrix_at_once():
    """GPTQ of the one row that the columns make, end to end, under the Kronecker product of both sides."""
    weight, _, inputs, outputs = case(rows=6, columns=7)
    step = weight.abs().amax(1, keepdim=True) / 7
    whole = torch.kron(damped(inputs), damped(outputs))
    carried = torch.linalg.cholesky(torch.linalg.inv(whole), upper=True)
    left, steps = weight.T.reshape(-1).double(), step.expand(6, 7).T.reshape(-1)
    expected = torch.empty(42)
    for i in range(42):
        expected[i] = (left[i] / steps[i]).round().clamp(-7, 7)
        left[i:] -= (left[i] - expected[i] * steps[i]) / carried[i, i] * carried[i, i:]
    assert torch.equal(round_under(weight, step, 7, inputs, outputs), expected.view(7, 6).T)


def damped(gram):
    return gram + rounding.DAMPING * gram.diagonal().mean() * torch.eye(len(gram))


@pytest.mark.parametrize("sides", [(True, False), (True, True)])
def test_tiles_change_nothing(monkeypatch, sides):
    """But ties, which fp32 may break the other way: what follows one is rounded differently, and as well."""
    weight, step, *grams = case()
    known = [gram if used else None for gram, used in zip(grams, sides, strict=True)]
    whole = loss(weight, round_under(weight, step, LIMIT, *known) * step, *grams)
    monkeypatch.setattr(rounding, "BLOCK", 7)
    assert loss(weight, round_under(weight, step, LIMIT, *known) * step, *grams) == pytest.approx(
        whole, rel=0.05
    )


def test_steps_may_go_with_the_columns_and_be_zero():
    weight, _, inputs, outputs = case()
    weight[:, 3] = 0
    step = weight.abs().amax(0) / LIMIT
    q = round_under(weight, step, LIMIT, inputs)
    naive = plain(weight, step.where(step > 0, 1.0)) * step
    assert loss(weight, q * step, inputs, outputs) < loss(weight, naive, inputs, outputs)


def test_refit_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(9, 30, generator=generator), torch.randn(20, 9, generator=generator))
    moved = first + 0.1 * torch.randn(9, 30, generator=generator)
    x = torch.randn(30, 200, generator=generator).double()
    z, now = first.double() @ x, moved.double() @ x
    expected = torch.linalg.lstsq(now.T, (second.double() @ z).T).solution.T
    torch.testing.assert_close(refit(second, z @ now.T, now @ now.T), expected.float(), rtol=1e-3, atol=1e-4)
