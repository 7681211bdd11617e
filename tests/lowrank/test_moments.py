from __future__ import annotations

import pytest
import torch

from neuronmlp_plugin.errors import CalibrationError, NonFiniteError
from neuronmlp_plugin.lowrank.moments import SecondMoment


def test_a_sum_of_batches_equals_one_big_batch():
    rows = torch.randn(100, 7)
    streamed = SecondMoment(7)
    for batch in rows.split(13):
        streamed.add(batch)
    exact = rows.double().T @ rows.double() / 100
    torch.testing.assert_close(streamed.mean(), exact, rtol=1e-5, atol=1e-6)
    assert streamed.count == 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_are_refused(bad):
    rows = torch.randn(4, 3)
    rows[2, 1] = bad
    with pytest.raises(NonFiniteError, match="activations"):
        SecondMoment(3).add(rows)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(CalibrationError, match="at least one token"):
        SecondMoment(3).mean()
