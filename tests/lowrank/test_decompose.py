"""What the factorisation claims: its loss is what it predicts, no other of its rank is better, and nothing
singular stops it.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from neuronmlp_plugin.errors import NonFiniteError
from neuronmlp_plugin.lowrank.decompose import decompose, metric_norm

SIZES = [(20, 12), (12, 20), (16, 16)]  # tall (gate, up), wide (down), square


def problem(out: int, n_in: int, seed: int = 0, spread: float = 1.0):
    """A weight, inputs with a decaying spectrum, and gradients at the output."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, n_in, generator=g, dtype=torch.float64)
    scales = torch.exp(-spread * torch.arange(n_in) / 4.0)
    x = torch.randn(400, n_in, generator=g, dtype=torch.float64) * scales
    grads = torch.randn(300, out, generator=g, dtype=torch.float64) * torch.linspace(0.2, 3.0, out)
    return weight, x, grads


def output_loss(weight, first, second, x, metric=None) -> float:
    return metric_norm(x @ (weight - second @ first).T, metric) ** 2 / len(x)


@pytest.mark.parametrize("size", SIZES)
def test_plain_loss_is_the_dropped_singular_values(size):
    weight, _, _ = problem(*size)
    first, second = decompose(weight).truncate(5)
    dropped = torch.linalg.svdvals(weight)[5:].square().sum()
    torch.testing.assert_close((weight - second @ first).square().sum(), dropped)


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
@pytest.mark.parametrize("size", SIZES)
def test_achieved_loss_is_the_predicted_tail(size, kind):
    weight, x, grads = problem(*size)
    moment, full = x.T @ x / len(x), grads.T @ grads / len(grads)
    metric = {"none": None, "diagonal": full.diagonal(), "full": full}[kind]
    found = decompose(weight, moment, metric)
    for rank in (1, 4, 9):
        loss = output_loss(weight, *found.truncate(rank), x, metric)
        assert loss == pytest.approx(float(found.tail()[rank]), rel=2e-3)


@pytest.mark.parametrize("size", SIZES)
def test_whitened_beats_plain_on_outputs(size):
    weight, x, _ = problem(*size)
    moment = x.T @ x / len(x)
    whitened = output_loss(weight, *decompose(weight, moment).truncate(5), x)
    plain = output_loss(weight, *decompose(weight).truncate(5), x)
    assert whitened < 0.9 * plain


@pytest.mark.parametrize("size", SIZES)
def test_two_sided_beats_whitened_in_the_output_metric(size):
    weight, x, grads = problem(*size)
    moment, metric = x.T @ x / len(x), grads.T @ grads / len(grads)
    two_sided = output_loss(weight, *decompose(weight, moment, metric).truncate(5), x, metric)
    whitened = output_loss(weight, *decompose(weight, moment).truncate(5), x, metric)
    assert two_sided < 0.98 * whitened


@given(st.sampled_from(SIZES), st.integers(1, 11), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_no_perturbation_of_the_same_rank_is_better(size, rank, seed):
    weight, x, _ = problem(*size, seed=seed)
    first, second = decompose(weight, x.T @ x / len(x)).truncate(rank)
    best = output_loss(weight, first, second, x)
    moment = x.T @ x / len(x)
    refit = torch.linalg.solve(
        first @ moment @ first.T, (weight @ moment @ first.T).T
    ).T  # the best partner that `first` can have
    assert output_loss(weight, first, refit, x) >= best * (1 - 1e-3)
    g = torch.Generator().manual_seed(seed)
    for step in (1e-2, 1e-1):
        other = output_loss(weight, first + step * torch.randn(first.shape, generator=g), second, x)
        assert other >= best * (1 - 1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_a_singular_moment_loses_nothing_where_inputs_live(size):
    weight, x, _ = problem(*size)
    x[:, 3:] = 0  # inputs span three directions: rank 3 must be enough
    found = decompose(weight, x.T @ x / len(x))
    first, second = found.truncate(3)
    assert bool(torch.isfinite(first).all() and torch.isfinite(second).all())
    assert output_loss(weight, first, second, x) < 1e-3 * output_loss(weight, 0 * first, second, x)


def test_zero_inputs_still_give_finite_factors():
    weight, _, _ = problem(20, 12)
    first, second = decompose(weight, torch.zeros(12, 12)).truncate(4)
    assert bool(torch.isfinite(first).all() and torch.isfinite(second).all())


def test_factors_are_balanced():
    weight, x, _ = problem(20, 12)
    first, second = decompose(weight, x.T @ x).truncate(6)
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))


@pytest.mark.parametrize("which", ["weight", "input moment", "output metric"])
def test_non_finite_inputs_are_refused(which):
    weight, x, grads = problem(20, 12)
    tensors = {"weight": weight, "input moment": x.T @ x, "output metric": grads.T @ grads}
    tensors[which][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=which):
        decompose(*tensors.values())
