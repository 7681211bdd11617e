"""Packing is exact, plan-free and holds nothing that a kernel does not need."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_kernels.cases import PROJECTIONS, MLPCase, random_weights
from nki_kernels.layout import FORMS, Layout, Projection, chain_layout, mlp_layout
from nki_kernels.packing import factors_by_name, pack, pack_norm, unpack
from nki_kernels.tiling import IDENTITY, Matrix, pieces

sizes = st.integers(2, 300)


@st.composite
def mlp_cases(draw):
    hidden, intermediate = draw(sizes), draw(sizes)
    forms = draw(st.tuples(*[st.sampled_from(FORMS)] * 3))
    ranks = draw(st.tuples(*[st.integers(1, min(hidden, intermediate) - 1)] * 3))
    return MLPCase(1, hidden, intermediate, forms, ranks, "fp32")


def layout_of(case: MLPCase) -> Layout:
    return mlp_layout(case.hidden, case.intermediate, *case.projections)


@given(mlp_cases())
@settings(max_examples=60, deadline=None)
def test_unpack_inverts_pack_bit_for_bit(case):
    layout, weights = layout_of(case), factors_by_name(random_weights(case))
    packed = pack(layout, weights)
    assert packed.shape == (128, layout.packed_cols)
    back = unpack(layout, packed)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(back[name], weight, err_msg=name)


@given(mlp_cases())
@settings(max_examples=40, deadline=None)
def test_what_is_stored_is_the_weights_and_the_edges_of_tiles(case):
    """Padding: under one row tile and one column tile per matrix, besides one identity where a compact factor
    needs it.
    """
    layout, weights = layout_of(case), random_weights(case)
    needed = sum(w.size for tensors in weights.values() for w in tensors.values())
    edges = sum(
        128 * (m.rows + m.cols) for m in map(layout.matrix, factors_by_name(weights)) if m is not None
    )
    pivots = sum(m.pivots * 128 for m in map(layout.matrix, factors_by_name(weights)) if m is not None)
    assert needed <= 128 * layout.stored_cols + pivots <= needed + edges + 2 * pivots


@given(mlp_cases())
@settings(max_examples=40, deadline=None)
def test_blocks_cover_every_number_of_the_logical_matrix_once(case):
    """Summing the blocks, identities included, gives the whole matrix [I | C^T] or [I ; C^T]."""
    layout, weights = layout_of(case), factors_by_name(random_weights(case))
    packed = pack(layout, weights)
    totals = {
        name: np.zeros((m.rows, m.cols), np.float32)
        for name in weights
        if (m := layout.matrix(name)) is not None
    }
    found = [
        (name, n, block, packed[block[1] : block[1] + block[2], offset : offset + matrix.tile_width(n)])
        for name, matrix, n, block, offset in layout.blocks()
    ]
    for name, matrix, n, _ in layout.tiles():  # what is not stored
        found += [
            (name, n, block, np.eye(block[2], matrix.tile_width(n)))
            for block in matrix.blocks(n)
            if block[3] == IDENTITY
        ]
    for name, n, (k, _first, rows, _kind), numbers in found:
        col = n * layout.matrix(name).tile_cols
        totals[name][128 * k : 128 * k + rows, col : col + numbers.shape[1]] += numbers
    for name, weight in weights.items():
        np.testing.assert_array_equal(totals[name], logical(layout.matrix(name), weight), err_msg=name)


def logical(matrix: Matrix, weight: np.ndarray) -> np.ndarray:
    identity = np.eye(matrix.pivots, dtype=np.float32)
    if matrix.pivot_axis == "cols":
        return np.concatenate([identity, weight.T], axis=1)
    return np.concatenate([identity, weight.T]) if matrix.pivot_axis == "rows" else weight.T


def test_torch_tensors_pack_to_the_same_bytes_and_back():
    torch = pytest.importorskip("torch")
    case = MLPCase(1, 200, 392, ("compact", "uv", "compact"), (70, 133, 150), "fp32")
    layout, weights = layout_of(case), factors_by_name(random_weights(case))
    tensors = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    packed = pack(layout, tensors, out=torch.zeros(128, layout.packed_cols))
    np.testing.assert_array_equal(packed.numpy(), pack(layout, weights))
    back = unpack(layout, packed, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_tensors_of_another_shape_are_refused_by_name():
    case = MLPCase(1, 64, 96, ("uv",) * 3, (10, 11, 12), "fp32")
    weights = factors_by_name(random_weights(case))
    weights["up_second"] = weights["up_second"].T
    with pytest.raises(
        ValueError, match=r"up_second: expected a tensor of shape \(96, 11\), found \(11, 96\)"
    ):
        pack(layout_of(case), weights)
    del weights["up_second"]
    with pytest.raises(ValueError, match="found None"):
        pack(layout_of(case), weights)


def test_every_format_tensor_has_a_matrix():
    for form in FORMS:
        case = MLPCase(1, 64, 96, (form,) * 3, (10, 11, 12))
        names = factors_by_name(random_weights(case))
        assert len(names) == sum(len(random_weights(case)[p]) for p in PROJECTIONS)
        assert {name for name in names if layout_of(case).matrix(name) is None} == set()


def test_rows_are_long():
    """A chunk of any length is one contiguous run per partition, because the packed array is streamed in
    column order.
    """
    layout = mlp_layout(2048, 8192, *[Projection.whole("uv", 1408)] * 3)
    assert layout.stored_cols * 128 == 3 * 1408 * (2048 + 8192)


def test_norm_weights_lie_channel_by_partition():
    weight = np.arange(300, dtype=np.float32)
    packed = pack_norm(weight)
    assert packed.shape == (128, 3) and packed[5, 2] == 2 * 128 + 5 and packed[127, 2] == 0


@pytest.mark.parametrize(("form", "rank"), [("dense", 3), ("uv", None), ("compact", 0), ("svd", 4)])
def test_impossible_projections_are_refused(form, rank):
    with pytest.raises(ValueError, match="projection: expected"):
        Projection.whole(form, rank)


def test_a_chain_is_a_down_projection_and_pieces_cover():
    assert chain_layout(30, 20, Projection.whole("uv", 5)).down_first == Matrix(30, 5, twice=True)
    assert chain_layout(30, 20, Projection.whole("dense"), True).down_second == Matrix(30, 20, 128)
    assert pieces(300, 128) == [(0, 128), (128, 128), (256, 44)]
