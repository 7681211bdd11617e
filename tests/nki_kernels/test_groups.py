"""Grouped factors in one launch, ragged tails that share a block, narrow layers; against the NumPy reference
and, rank by rank, against themselves.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from nki_kernels import reference
from nki_kernels.cases import DTYPES, MAX_ERROR, MLPCase, error, random_array, random_weights
from nki_kernels.layout import DENSE, Projection, gate_layout, mlp_layout
from nki_kernels.packing import factors_by_name, pack, unpack
from nki_kernels.planner import Choice, Request, build_plan
from tests.nki_kernels.harness import run_svd_mlp

MIXES = [
    ("uv", "uv", "uv"),
    ("compact", "compact", "compact"),
    ("dense", "compact", "uv"),
    ("uv", "dense", "compact"),
    ("compact", "uv", "dense"),
]
# I, and a rank for each projection: tails of more and of fewer than 64 rows, whole tiles, groups off the
# tiles.
SIZES = {
    1: (640, (140, 300, 128)),
    2: (640, (37, 150, 130)),
    4: (1040, (130, 64, 20)),
    8: (1040, (1, 70, 33)),
}


@pytest.mark.parametrize(("groups", "forms"), list(itertools.product(SIZES, MIXES)))
def test_groups_are_one_launch(groups, forms):
    intermediate, ranks = SIZES[groups]
    for tokens, dtype in ((3, "fp32"), (300, "bf16")):
        case = MLPCase(tokens, 200, intermediate, forms, ranks, dtype, tokens > 3, tokens > 3, groups)
        found, expected = run_svd_mlp(case)
        assert error(found, expected) <= MAX_ERROR[dtype], case


def test_shared_blocks_survive_a_ring_too_small_for_them():
    """A block that the next column tile shares is read again where it has left the ring."""
    case = MLPCase(300, 700, 1000, ("uv", "compact", "compact"), (150, 190, 160), "fp32", groups=2)
    layout = mlp_layout(case.hidden, case.intermediate, *case.projections)
    plan = build_plan(Request(layout, case.tokens, DTYPES["fp32"]), Choice(256, 1, 512, 512, 1))
    found, expected = run_svd_mlp(case, plan)
    assert error(found, expected) <= MAX_ERROR["fp32"]


@pytest.mark.parametrize("forms", MIXES)
@pytest.mark.parametrize(("groups", "tp"), [(2, 2), (4, 2), (4, 4), (8, 2)])
def test_the_shares_of_ranks_add_up(forms, groups, tp):
    """A rank's contiguous part of every stored tensor is an MLP of groups / tp groups and I / tp channels."""
    intermediate, ranks = SIZES[groups]
    case = MLPCase(5, 96, intermediate, forms, ranks, "fp32", groups=groups)
    weights = random_weights(case)
    mine = dataclasses.replace(case, intermediate=intermediate // tp, groups=groups // tp)
    parts = [run_svd_mlp(mine, weights=share(weights, tp, rank))[0] for rank in range(tp)]
    x = random_array(np.random.default_rng(1), (5, 96), DTYPES["fp32"])
    assert error(sum(parts), reference.svd_mlp(x, weights, groups=groups)) <= MAX_ERROR["fp32"]


def share(weights, tp, rank):
    """Along the first dimension, but down's last factor along the second (FORMAT.md)."""
    along = {("down_proj", "v.weight"): 1, ("down_proj", "weight"): 1}
    return {
        name: {part: np.split(t, tp, along.get((name, part), 0))[rank] for part, t in tensors.items()}
        for name, tensors in weights.items()
    }


def test_a_grouped_matrix_is_the_block_diagonal_one():
    """The reference of the reference: factors multiplied out, blocks of zeros and all."""
    case = MLPCase(4, 60, 96, ("compact", "uv", "compact"), (7, 9, 8), "fp32", groups=4)
    weights = random_weights(case)
    x = random_array(np.random.default_rng(4), (4, 60), DTYPES["fp32"])
    u, c = weights["gate_proj"]["u.weight"], weights["gate_proj"]["c.weight"]
    rows = []
    for group in range(4):
        block = np.zeros((24, 28), np.float32)
        block[:7, 7 * group : 7 * group + 7] = np.eye(7)
        block[7:, 7 * group : 7 * group + 7] = c[17 * group : 17 * group + 17]
        rows.append(block)
    gate = x @ (np.concatenate(rows) @ u).T
    assert error(reference.output_projection(x, weights["gate_proj"], 4), gate) < 1e-6


@pytest.mark.parametrize("groups", SIZES)
@pytest.mark.parametrize("forms", MIXES)
def test_packing_and_unpacking_are_inverse(groups, forms):
    intermediate, ranks = SIZES[groups]
    case = MLPCase(1, 96, intermediate, forms, ranks, "fp32", groups=groups)
    layout = mlp_layout(case.hidden, case.intermediate, *case.projections)
    factors = factors_by_name(random_weights(case))
    for name, tensor in unpack(layout, pack(layout, factors)).items():
        np.testing.assert_array_equal(tensor, factors[name])


def test_zero_blocks_are_neither_stored_nor_multiplied():
    """g groups of rank R / g read what one of rank R / g on a g-th of the channels reads, g times over; a
    dense second factor would be g times as large.
    """
    grouped = mlp_layout(512, 4096, *(Projection.whole("uv", 128, 4),) * 3)
    alone = mlp_layout(512, 1024, *(Projection.whole("uv", 128),) * 3)
    assert grouped.stored_cols == 4 * alone.stored_cols


@pytest.mark.parametrize(("rank", "columns"), [(384, 3), (385, 3.5), (448, 3.5), (449, 4), (30, 0.5)])
def test_a_short_tail_costs_half_a_tile(rank, columns):
    """385 is three row tiles and one row: two column tiles share the block of the fourth."""
    _, second = gate_layout(1024, 2048, Projection.whole("uv", rank))
    stored = sum(kind == 0 for n in range(second.col_tiles()) for *_, kind in second.blocks(n))
    assert stored == columns * 16


def test_projections_of_one_launch_have_the_same_groups():
    with pytest.raises(ValueError, match="groups: expected 4 in every projection, found 2"):
        mlp_layout(64, 64, Projection.whole("uv", 8, 4), DENSE, Projection.whole("uv", 8, 2))
