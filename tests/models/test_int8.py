"""What rounding to int8 promises, for any matrix."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from neuronmlp_plugin.models.definition import LIMIT, dequantize, quantize

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def drawn(rows, columns, seed, dtype):
    """A matrix whose channels differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (4 * torch.rand(rows, 1, generator=generator) - 3)
    return (torch.randn(rows, columns, generator=generator) * spread).to(dtype)


@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 999), DTYPES)
@settings(deadline=None, max_examples=100)
def test_no_element_moves_by_more_than_half_a_step(rows, columns, seed, dtype):
    weight = drawn(rows, columns, seed, dtype)
    q, scale = quantize(weight)
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, torch.float32, weight.shape, (rows,))
    assert int(q.int().abs().max()) <= LIMIT
    error = (weight.double() - q.double() * scale.double()[:, None]).abs()
    assert bool((error <= scale.double()[:, None] * (0.5 + 1e-5)).all())


@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 999))
@settings(deadline=None, max_examples=50)
def test_what_is_dequantised_is_quantised_to_itself(rows, columns, seed):
    once = dequantize(*quantize(drawn(rows, columns, seed, torch.float32)))
    torch.testing.assert_close(dequantize(*quantize(once)), once, rtol=1e-6, atol=0)


@given(st.integers(2, 20), st.integers(16, 40), st.integers(0, 999))
@settings(deadline=None, max_examples=50)
def test_a_scale_a_channel_keeps_the_small_channels_that_one_for_the_matrix_loses(rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = weight / weight.abs().amax(dim=1, keepdim=True) * torch.logspace(0, -3, rows)[:, None]
    step = weight.abs().max() / LIMIT
    by_channel, whole = [
        (weight - other).norm(dim=1) / weight.norm(dim=1)
        for other in (dequantize(*quantize(weight)), (weight / step).round() * step)
    ]
    assert (
        by_channel.max() < 0.5 * columns**0.5 / LIMIT
    )  # half a step everywhere, against at least the largest element
    assert whole[-1] == 1.0


def test_a_channel_of_zeros_has_scale_zero():
    q, scale = quantize(torch.tensor([[0.0, 0.0], [2.0, -1.0]]))
    assert scale.tolist() == [0.0, torch.tensor(2 / 127).item()]
    assert q.tolist() == [[0, 0], [127, -64]]
    assert dequantize(q, scale)[0].tolist() == [0.0, 0.0]
