"""A grouped, narrow layer computes what FORMAT.md says, its shares add up to it, and nothing is stored or
multiplied twice.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.models.definition import build_linear, factors_of, mlp, quantize, share_of, tensors_of
from neuronmlp_plugin.models.factors import (
    DENSE,
    PROJECTIONS,
    SCALE,
    Matrix,
    MLPLayer,
    ProjectionSpec,
    full_speed_sizes,
)
from tests.models.layers import MIXES, SHAPE, mix_layer, random_modules

RANKS = {"gate_proj": 3, "up_proj": 2, "down_proj": 4}
T = 5


def grouped(mix, groups, channels=40):
    return mix_layer(mix, SHAPE, ranks=RANKS, channels=channels, groups=groups)


def tensors_by_projection(layer, dtype=torch.float64):
    modules = random_modules(layer)
    return {p: {n: t.to(dtype) for n, t in m.state_dict().items()} for p, m in modules.items()}


def whole_matrix(matrix, tensors):
    """The dense `[out, in]` that the tensors stand for, group by group as FORMAT.md tells it."""
    if not matrix.spec.is_low_rank:
        return tensors["weight"]
    groups, rank = matrix.groups, matrix.spec.rank
    width, eye = matrix.channels // groups, torch.eye(rank, dtype=torch.float64)
    slices = []
    for t in range(groups):
        rows = slice(t * rank, (t + 1) * rank)
        rest = slice(t * (width - rank), (t + 1) * (width - rank))
        if matrix.spec.form == "uv" and matrix.is_down:
            slices.append(tensors["v.weight"][:, rows] @ tensors["u.weight"][rows])
        elif matrix.spec.form == "uv":
            slices.append(tensors["v.weight"][t * width : (t + 1) * width] @ tensors["u.weight"][rows])
        elif matrix.is_down:
            slices.append(tensors["v.weight"][:, rows] @ torch.cat((eye, tensors["c.weight"][rows]), dim=1))
        else:
            slices.append(torch.cat((eye, tensors["c.weight"][rest])) @ tensors["u.weight"][rows])
    return torch.cat(slices, dim=1 if matrix.is_down else 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_a_layer_is_that_of_the_dense_matrices_that_its_factors_stand_for(mix, groups):
    layer, x = grouped(mix, groups), torch.randn(T, SHAPE.hidden_size, dtype=torch.float64)
    tensors = tensors_by_projection(layer)
    gate, up, down = (whole_matrix(layer.matrix(p), tensors[p]) for p in PROJECTIONS)
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(mlp(layer, tensors, x), expected, rtol=1e-12, atol=1e-12)
    modules = {p: m.double() for p, m in random_modules(layer).items()}
    with torch.no_grad():
        y = modules["down_proj"](F.silu(modules["gate_proj"](x)) * modules["up_proj"](x))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("groups", "tp"), [(2, 2), (4, 2), (4, 4), (8, 2)])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_the_shares_of_ranks_are_whole_layers_that_add_up(mix, groups, tp):
    """No rank needs anything of another but the sum of y, which a dense MLP needs too."""
    layer, x = grouped(mix, groups), torch.randn(T, SHAPE.hidden_size, dtype=torch.float64)
    tensors, share = tensors_by_projection(layer), layer.share(tp)
    assert share.channels == layer.channels // tp and not layer.gathers(tp)
    total = torch.zeros_like(x)
    for rank in range(tp):
        mine = {p: share_of(m, tensors[p], tp, rank) for p, m in layer.matrices.items()}
        shapes = {p: {n: tuple(t.shape) for n, t in given.items()} for p, given in mine.items()}
        assert shapes == {p: m.tensor_shapes() for p, m in share.matrices.items()}
        total += mlp(share, mine, x)
    torch.testing.assert_close(total, mlp(layer, tensors, x), rtol=1e-12, atol=1e-12)
    assert tp * share.parameters == layer.parameters


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_blocks_of_zeros_are_neither_stored_nor_multiplied(groups):
    """Two operations a stored number and token, whatever the number of groups."""
    layer = grouped(("uv", "compact", "compact"), groups)
    tensors = tensors_by_projection(layer, torch.float32)
    with FlopCounterMode(display=False) as counter:
        mlp(layer, tensors, torch.randn(T, SHAPE.hidden_size))
    stored = sum(t.numel() for given in tensors.values() for t in given.values())
    assert counter.get_total_flops() == 2 * T * stored == 2 * T * layer.parameters
    h, width = SHAPE.hidden_size, layer.channels // groups
    per_group = {
        "gate_proj": 3 * (h + width),
        "up_proj": 2 * (h + width - 2),
        "down_proj": 4 * (h + width - 4),
    }
    assert layer.parameters == groups * sum(per_group.values())


@pytest.mark.parametrize("form", ["dense", "uv", "compact"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_int8_shares_have_the_scales_of_their_rows(projection, form):
    spec = ProjectionSpec(form, None if form == "dense" else 3, "int8")
    matrix = Matrix(projection, spec, SHAPE.hidden_size, 40, 2)
    tensors = {}
    for name, weight in build_linear(matrix).state_dict().items():
        tensors[name], tensors[name + SCALE] = quantize(weight)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == matrix.stored_shapes()
    whole = factors_of(matrix, tensors)
    assert tensors_of(matrix, *whole).keys() == tensors.keys()
    shares = [factors_of(matrix, share_of(matrix, tensors, 2, rank)) for rank in range(2)]
    for suffix, weight, parts in zip(matrix.suffixes, whole, zip(*shares, strict=True), strict=True):
        if weight is not None:
            joined = torch.cat([part.expanded() for part in parts], dim=matrix.split_dim(suffix))
            assert torch.equal(joined, weight.expanded())


@pytest.mark.parametrize(
    ("layer", "fits", "gathers"),
    [
        (MLPLayer(8, 48, DENSE, DENSE, DENSE, groups=4), (1, 2, 3, 4, 6, 8), ()),
        (MLPLayer(8, 48, DENSE, DENSE, ProjectionSpec("uv", 3), groups=4), (1, 2, 4), ()),
        (MLPLayer(8, 48, DENSE, DENSE, ProjectionSpec("uv", 3)), (1,), (2, 3, 4, 6, 8)),
    ],
)
def test_which_sizes_serve_a_layer(layer, fits, gathers):
    for tp in range(1, 9):
        assert layer.fits(tp) == (tp in fits)
        if tp in (*fits, *gathers):
            assert layer.gathers(tp) == (tp in gathers)
        else:
            with pytest.raises(UsageError, match=f"tensor parallel size {tp}: expected a size that serves"):
                layer.gathers(tp)


def test_full_speed_is_what_every_layer_fits():
    dense = MLPLayer(8, 36, DENSE, DENSE, DENSE, groups=4)
    low = MLPLayer(8, 48, DENSE, DENSE, ProjectionSpec("uv", 3), groups=4)
    assert full_speed_sizes((low, low)) == [1, 2, 4]
    assert full_speed_sizes((dense, low)) == [1, 2, 4]
    assert full_speed_sizes((dense, MLPLayer(8, 48, DENSE, DENSE, DENSE, groups=4))) == [1, 2, 3, 4, 6, 12]
