"""The whole gated MLP against its reference: every mix of forms, ragged sizes, both formats, and shapes of
real models.
"""

import numpy as np
import pytest

from nki_kernels import reference
from nki_kernels.cases import DTYPES, MAX_ERROR, TOKENS, MLPCase, error, mlp_grid, model_grid, random_weights
from nki_kernels.layout import mlp_layout
from nki_kernels.planner import Choice, Request, build_plan
from tests.nki_kernels.harness import EPS, inputs, run_svd_mlp


@pytest.mark.parametrize("case", list(mlp_grid()), ids=str)
def test_equals_the_reference(case):
    found, expected = run_svd_mlp(case)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert error(found, expected) <= MAX_ERROR[case.dtype], case


def test_the_grid_meets_every_token_count_and_mix_in_both_formats():
    grid = list(mlp_grid())
    assert {case.tokens for case in grid} == set(TOKENS)
    assert len({(case.forms, case.dtype) for case in grid}) == 27 * 2
    assert {(case.norm, case.residual) for case in grid} == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", list(model_grid()), ids=str)
def test_equals_the_reference_at_shapes_of_real_models(case):
    found, expected = run_svd_mlp(case)
    assert error(found, expected) <= MAX_ERROR[case.dtype], case


def test_bf16_is_as_close_to_exact_arithmetic_as_storing_in_bf16_allows():
    """Sums in fp32: what remains is the rounding of z, h and y, about 2^-9 each, however long the sums
    are.
    """
    case = MLPCase(33, 512, 1536, ("uv", "compact", "uv"), (300, 260, 310))
    weights = random_weights(case)
    exact = reference.svd_mlp(inputs(case)[0].astype(np.float32), _as_fp32(weights))
    found, _ = run_svd_mlp(case, weights=weights)
    assert error(found, exact) < 4 * 2**-9


def _as_fp32(weights):
    return {
        name: {suffix: w.astype(np.float32) for suffix, w in tensors.items()}
        for name, tensors in weights.items()
    }


def test_token_blocks_rings_and_groups_do_not_change_the_result():
    case = MLPCase(
        300, 130, 257, ("compact", "uv", "compact"), (60, 70, 150), "fp32", norm=True, residual=True
    )
    request = Request(
        mlp_layout(case.hidden, case.intermediate, *case.projections), case.tokens, DTYPES["fp32"], EPS, True
    )
    results = []
    for block_tokens, group, out_cols, slots in (
        (300, 4, 0, 9),
        (128, 1, 0, 1),
        (256, 2, 512, 2),
        (97, 8, 0, 2),
    ):
        plan = build_plan(request, Choice(block_tokens, slots, 512, out_cols, group))
        results.append(run_svd_mlp(case, plan)[0])
    for other in results[1:]:
        assert error(other, results[0]) <= 1e-6  # BLAS may sum in another order for another width


def test_a_row_of_tokens_does_not_depend_on_its_neighbours():
    """A mixed-up token tile would show: token 7 alone gives what it gives among 129 others."""
    case = MLPCase(129, 200, 392, ("uv", "compact", "dense"), (70, 133, 150), "fp32", norm=True)
    weights = random_weights(case)
    many, _ = run_svd_mlp(case, weights=weights)
    x, norm_weight, _ = inputs(case)
    expected = reference.svd_mlp(x[7:8], weights, (norm_weight, EPS))
    assert error(many[7:8], expected) <= MAX_ERROR["fp32"]
