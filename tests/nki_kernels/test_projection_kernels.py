"""xuv, gated_up and down by themselves: every orientation, SiLU, residual, every form; and their handing over
to one another.
"""

import itertools

import numpy as np
import pytest

from nki_kernels import reference
from nki_kernels.backend import simulate
from nki_kernels.cases import DTYPES, MAX_ERROR, MLPCase, error, random_array, random_weights
from nki_kernels.kernels.svd_mlp import down, gated_up, xuv
from nki_kernels.layout import FORMS, chain_layout, gated_layout
from nki_kernels.packing import factors_by_name, pack
from nki_kernels.planner import Request, plan_launch
from nki_kernels.tile_plan import Plan

ORIENTATIONS = list(itertools.product((False, True), repeat=2))


def down_only(weights: dict) -> dict:
    """The down projection's tensors by matrix name."""
    return factors_by_name({"down_proj": weights["down_proj"]})


def chain(
    case: MLPCase, transposed_input: bool, transposed_output: bool, silu: bool = False, residual: bool = False
) -> tuple[Plan, np.ndarray]:
    """(plan, packed weights) of the case's down projection by itself."""
    layout = chain_layout(case.intermediate, case.hidden, case.projections[2], transposed_output)
    request = Request(
        layout,
        case.tokens,
        DTYPES[case.dtype],
        residual=residual,
        silu=silu,
        transposed_input=transposed_input,
    )
    plan = plan_launch(request)
    assert isinstance(plan, Plan), plan
    return plan, pack(layout, down_only(random_weights(case)))


@pytest.mark.parametrize(("form", "dtype"), list(itertools.product(FORMS, DTYPES)))
@pytest.mark.parametrize(("transposed_input", "transposed_output"), ORIENTATIONS)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "rank"),
    [(1, 130, 257, 100), (129, 200, 392, 150), (600, 96, 200, 41)],
)
def test_xuv_in_every_orientation(
    form, dtype, transposed_input, transposed_output, tokens, hidden, intermediate, rank
):
    case = MLPCase(tokens, hidden, intermediate, (form,) * 3, (rank,) * 3, dtype)
    silu = tokens > 1
    plan, packed = chain(case, transposed_input, transposed_output, silu)
    x = random_array(np.random.default_rng(2), (tokens, intermediate), DTYPES[dtype])
    found = simulate(xuv)(np.ascontiguousarray(x.T) if transposed_input else x, packed, plan)
    expected = reference.xuv(x, random_weights(case)["down_proj"], silu)
    assert error(found.T if transposed_output else found, expected) <= MAX_ERROR[dtype], case


@pytest.mark.parametrize(
    "forms", [("uv", "uv", "uv"), ("compact", "dense", "compact"), ("uv", "compact", "dense")]
)
@pytest.mark.parametrize("transposed_input", [False, True])
@pytest.mark.parametrize("sizes", [(200, 392), (392, 200)])
def test_gated_up_hands_its_transposed_result_to_down(forms, transposed_input, sizes):
    case = MLPCase(140, *sizes, forms, (70, 133, 150), "fp32")
    weights, dtype = random_weights(case), DTYPES["fp32"]
    layout = gated_layout(case.hidden, case.intermediate, *case.projections[:2])
    plan = plan_launch(Request(layout, case.tokens, dtype, transposed_input=transposed_input))
    x = random_array(np.random.default_rng(3), (case.tokens, case.hidden), dtype)
    packed = pack(layout, factors_by_name({name: weights[name] for name in ("gate_proj", "up_proj")}))
    h = simulate(gated_up)(np.ascontiguousarray(x.T) if transposed_input else x, packed, plan)
    assert error(h.T, reference.gated_up(x, weights["gate_proj"], weights["up_proj"])) <= MAX_ERROR["fp32"]

    down_plan, down_packed = chain(case, True, False, residual=True)
    y = simulate(down)(h, down_packed, down_plan, x)
    assert error(y, reference.down(h.T, weights["down_proj"], x)) <= MAX_ERROR["fp32"]


def test_gate_and_up_are_not_interchangeable():
    """The reference with the two swapped is far off, so agreement above means that the kernel has them the
    right way round.
    """
    case = MLPCase(9, 96, 200, ("uv",) * 3, (37, 53, 41), "fp32")
    weights = random_weights(case)
    x = random_array(np.random.default_rng(3), (9, 96), DTYPES["fp32"])
    right = reference.gated_up(x, weights["gate_proj"], weights["up_proj"])
    assert error(reference.gated_up(x, weights["up_proj"], weights["gate_proj"]), right) > 0.1


def test_the_reference_is_the_plain_formula():
    """In fp64, with the factors multiplied out: no code shared with the kernels or with the forms."""
    case = MLPCase(5, 60, 90, ("compact", "uv", "compact"), (20, 30, 25), "fp32", norm=False)
    weights = random_weights(case)
    gate, up, down_ = (multiplied_out(weights[name]) for name in ("gate_proj", "up_proj", "down_proj"))
    x = random_array(np.random.default_rng(4), (5, 60), DTYPES["fp32"]).astype(np.float64)
    g = x @ gate.T
    expected = (g / (1 + np.exp(-g)) * (x @ up.T)) @ down_.T
    assert error(reference.svd_mlp(x.astype(np.float32), weights), expected) < 1e-6


def multiplied_out(tensors: dict) -> np.ndarray:
    """The one matrix `[out, in]` that factors stand for."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    if "c.weight" not in w:
        return w["v.weight"] @ w["u.weight"]
    if "v.weight" in w:
        return w["v.weight"] @ np.concatenate([np.eye(w["c.weight"].shape[0]), w["c.weight"]], axis=1)
    return np.concatenate([np.eye(w["c.weight"].shape[1]), w["c.weight"]]) @ w["u.weight"]
