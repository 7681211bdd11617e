"""The MLP that NxDI gets equals the plain one at every rank, and moves no more bytes than it claims."""

from __future__ import annotations

import pytest
import torch

from neuronmlp_plugin.models.factors import DENSE, PROJECTIONS, MLPLayer, MLPShape, ProjectionSpec
from neuronmlp_plugin.models.gather import Collectives
from neuronmlp_plugin.serving.trainium.sharding import laid_out_shapes
from tests.models.layers import MIXES, RANKS, SHAPE, mix_layer, plain_mlp, random_modules, stored_tensors
from tests.serving.trainium.sharded import rank_mlp, rank_state
from tests.thread_group import ThreadGroup

B, S = 2, 12
NARROW = dict.fromkeys(PROJECTIONS, 3)


def run_all(mix, tp, x, groups=1, **options):
    """Each rank's `(y, residual)`; `x(rank)` gives its input."""
    layer = mix_layer(mix) if groups == 1 else mix_layer(mix, ranks=NARROW, channels=32, groups=groups)
    modules = {p: m.double() for p, m in random_modules(layer).items()}
    group = ThreadGroup(tp)

    @torch.no_grad()
    def work(collectives: Collectives):
        tensors = stored_tensors(layer, modules)
        return rank_mlp(layer, tensors, collectives, dtype=torch.float64, **options)(x(collectives.rank))

    with torch.no_grad():
        return modules, group.run(work), group.log


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_every_rank_gives_the_plain_answer(mix, tp):
    x = torch.randn(B, S, SHAPE.hidden_size, dtype=torch.float64)
    modules, results, _ = run_all(mix, tp, lambda rank: x)
    with torch.no_grad():
        expected = plain_mlp(modules, x)
    for y, residual in results:
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert residual is None


@pytest.mark.parametrize(("groups", "tp"), [(2, 1), (2, 2), (4, 2), (8, 4), (8, 8)])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_ranks_that_own_groups_give_the_plain_answer_at_the_price_of_a_dense_mlp(mix, groups, tp):
    """Of 32 of the 48 channels: counts and bytes of collectives are those of a dense layer."""
    x = torch.randn(B, S, SHAPE.hidden_size, dtype=torch.float64)
    modules, results, log = run_all(mix, tp, lambda rank: x, groups)
    with torch.no_grad():
        expected = plain_mlp(modules, x)
    for y, _ in results:
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert log == collectives_of(("dense", "dense", "dense"), tp) == [OUTPUT]


@pytest.mark.parametrize(("groups", "tp"), [(1, 3), (4, 2)])
@pytest.mark.parametrize("mix", [("compact", "uv", "dense"), ("dense", "compact", "compact")], ids="-".join)
def test_sequence_parallel_shares_out_the_tokens(mix, groups, tp):
    x = torch.randn(B, S, SHAPE.hidden_size, dtype=torch.float64)
    modules, results, _ = run_all(mix, tp, lambda rank: x.chunk(tp, dim=1)[rank], sequence_parallel=True)
    with torch.no_grad():
        expected = plain_mlp(modules, x)
    for (y, _), part in zip(results, expected.chunk(tp, dim=1), strict=True):
        torch.testing.assert_close(y, part, rtol=1e-12, atol=1e-12)


def test_norm_and_residual_follow_the_contract_of_nxdi():
    layer = mix_layer(("uv", "compact", "uv"))
    modules = random_modules(layer)
    x, before = torch.randn(B, S, SHAPE.hidden_size), torch.randn(B, S, SHAPE.hidden_size)
    norm = torch.nn.RMSNorm(SHAPE.hidden_size)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        mlp = rank_mlp(layer, stored_tensors(layer, modules), Collectives())
        y, residual = mlp(x, rmsnorm=norm, residual=before)
        torch.testing.assert_close(residual, x + before)
        torch.testing.assert_close(y, plain_mlp(modules, norm(x + before)))


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_one_graph_fits_every_rank(mix):
    layer, tp = mix_layer(mix), 4
    tensors = stored_tensors(layer, random_modules(layer))
    shapes = [
        {n: t.shape for n, t in rank_state(layer, tensors, tp, rank, {"torch"}).items()} for rank in range(tp)
    ]
    assert all(other == shapes[0] for other in shapes)


def collectives_of(mix, tp=2):
    x = torch.randn(B, S, SHAPE.hidden_size, dtype=torch.float64)
    return run_all(mix, tp, lambda rank: x)[2]


TOKEN_BYTES = B * S * 8
OUTPUT = ("all_reduce", TOKEN_BYTES * SHAPE.hidden_size)
SLOTS = {p: -(-r // 2) for p, r in RANKS.items()}


def test_gather_moves_ranks_only():
    assert collectives_of(("compact", "uv", "compact")) == [
        ("all_gather", TOKEN_BYTES * (SLOTS["gate_proj"] + SLOTS["up_proj"])),
        ("reduce_scatter", TOKEN_BYTES * 2 * SLOTS["down_proj"]),
        OUTPUT,
    ]


def test_a_dense_mlp_pays_for_its_output_alone():
    assert collectives_of(("dense", "dense", "dense")) == [OUTPUT]


def numbers_per_rank(spec: ProjectionSpec, shape: MLPShape, tp: int) -> int:
    """Weights that one rank of tp reads for one layer."""
    layer = MLPLayer(shape.hidden_size, shape.intermediate_size, spec, spec, spec)
    shapes = [laid_out_shapes(matrix, tp, layer.gathers(tp)) for matrix in layer.matrices.values()]
    return sum(rows * columns for sizes in shapes for rows, columns in sizes.values()) // tp


def test_an_8b_layer_saves_per_core_what_it_saves_as_a_whole_where_a_replicated_factor_costs():
    """Llama-3.1-8B, 5 % removed: R = 3026 as `uv`. All relative to what one core of two reads of a dense
    layer.
    """
    shape, tp = MLPShape(4096, 14336, 1), 2
    dense = numbers_per_rank(DENSE, shape, tp)
    uv, compact = ProjectionSpec("uv", 3026), ProjectionSpec("compact", 3818)
    replicated = (
        3 * 3026 * (shape.hidden_size + shape.intermediate_size // tp)
    )  # U of gate and up, V of down at every rank
    assert round(numbers_per_rank(uv, shape, tp) / dense, 3) == 0.95
    assert round(numbers_per_rank(compact, shape, tp) / dense, 3) == 0.95
    assert round(replicated / dense, 3) == 1.161
