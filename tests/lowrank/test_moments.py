from __future__ import annotations

import pytest
import torch

from neuronmlp_plugin.errors import CalibrationError, NonFiniteError
from neuronmlp_plugin.lowrank import decompose
from neuronmlp_plugin.lowrank.decompose import SecondMoment


def test_a_sum_of_batches_equals_one_big_batch():
    rows = torch.randn(100, 7)
    streamed = SecondMoment(7)
    for batch in rows.split(13):
        streamed.add(batch)
    exact = rows.double().T @ rows.double() / 100
    assert streamed.count == 100
    torch.testing.assert_close(streamed.mean(), exact, rtol=1e-5, atol=1e-6)


def test_blocks_give_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(decompose, "BLOCK", 3)
    rows, streamed = torch.randn(50, 8), SecondMoment(8)
    streamed.add(rows)
    mean = streamed.mean()
    torch.testing.assert_close(mean, rows.double().T @ rows.double() / 50, rtol=1e-5, atol=1e-6)
    assert bool((mean == mean.T)[3:, :3].all())


def test_the_mean_takes_the_sum_with_it():
    streamed = SecondMoment(3)
    streamed.add(torch.ones(2, 3))
    streamed.mean()
    with pytest.raises(CalibrationError, match="at least one token"):
        streamed.mean()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_are_refused(bad):
    rows = torch.randn(4, 3)
    rows[2, 1] = bad
    with pytest.raises(NonFiniteError, match="activations"):
        SecondMoment(3).add(rows)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(CalibrationError, match="at least one token"):
        SecondMoment(3).mean()
