"""The pieces between collectives, on every rank, against the unsharded reference; shards come from the
plugin's own sharding.
"""

import itertools

import numpy as np
import pytest

from nki_kernels import reference
from nki_kernels.backend import simulate
from nki_kernels.cases import DTYPES, MAX_ERROR, PROJECTIONS, MLPCase, error, random_array, random_weights
from nki_kernels.kernels.sharded import first_factors, last_factor, second_factors
from nki_kernels.layout import FORMS, Projection, first_stage, last_stage, mlp_layout, second_stage
from nki_kernels.packing import pack, pack_norm
from nki_kernels.planner import plan_launch
from nki_kernels.request import stage_request

torch = pytest.importorskip("torch")
from neuronmlp_plugin.models.factors import Matrix, ProjectionSpec  # noqa: E402
from neuronmlp_plugin.models.gather import gather_shard  # noqa: E402

EPS = 0.02
FP32 = DTYPES["fp32"]
MIXES = [mix for mix in itertools.product(FORMS, repeat=3) if len(set(mix)) != 2] + [
    ("dense", "dense", "uv"),
    ("compact", "compact", "dense"),
]


class Core:
    """One rank: its layout and the tensors of its matrices."""

    def __init__(self, case: MLPCase, weights: dict, tp: int, rank: int) -> None:
        self.case = case
        shards = {}
        for name, form, size in zip(PROJECTIONS, case.forms, case.ranks, strict=True):
            spec = ProjectionSpec(form, None if form == "dense" else size)
            tensors = {suffix: torch.from_numpy(tensor) for suffix, tensor in weights[name].items()}
            matrix = Matrix(name, spec, case.hidden, case.intermediate)
            shards[name] = gather_shard(matrix, tensors, tp, rank)
        projections = [
            Projection(form, tp * s.slots, s.slots, s.pivots, rank * s.slots)
            for form, s in zip(case.forms, shards.values(), strict=True)
        ]
        self.slots = tuple(p.slots for p in projections)
        self.layout = mlp_layout(case.hidden, case.intermediate // tp, *projections)
        self.tensors = {}
        for name, shard in shards.items():
            short = name.removesuffix("_proj")
            if shard.first is None or shard.second is None:
                self.tensors[f"{short}_second"] = (shard.first or shard.second).values
            else:
                self.tensors |= {
                    f"{short}_first": shard.first.values,
                    f"{short}_second": shard.second.values,
                }

    def launch(self, kernel, stage, *arrays, norm=None):
        """Run `kernel` over a stage of this core's layout."""
        eps = None if norm is None or not stage.hidden else EPS
        plan = plan_launch(stage_request(stage, self.case.tokens, FP32, eps))
        assert plan, plan
        packed = pack(
            stage, {name: t.numpy() for name, t in self.tensors.items() if stage.matrix(name) is not None}
        )
        keywords = {} if eps is None else {"norm_weight": pack_norm(norm)}
        return simulate(kernel)(*arrays, packed, plan, **keywords)


def sharded_mlp(cores: list, x: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """Scheme `gather` with the collectives done by hand."""
    z = None
    if first_stage(cores[0].layout).hidden:
        z = np.concatenate(
            [core.launch(first_factors, first_stage(core.layout), x, norm=norm) for core in cores]
        )
    parts = []
    for core in cores:
        stage = second_stage(core.layout)
        parts.append(
            core.launch(second_factors, stage, x if stage.hidden else None, z, core.slots, norm=norm)
        )
    if cores[0].layout.down_first is None:
        return sum(parts)
    shares = np.split(sum(parts), len(cores))
    return sum(
        core.launch(last_factor, last_stage(core.layout), np.ascontiguousarray(share))
        for core, share in zip(cores, shares, strict=True)
    )


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize(("tp", "tokens"), [(1, 5), (2, 130), (4, 3)])
def test_all_ranks_together_equal_the_unsharded_mlp(mix, tp, tokens):
    case = MLPCase(tokens, 96, 600, mix, (83, 301, 90), "fp32", norm=True)
    if tp == 1:
        case = MLPCase(tokens, 320, 600, mix, (83, 301, 150), "fp32", norm=True)
    weights = random_weights(case)
    rng = np.random.default_rng(5)
    x = random_array(rng, (tokens, case.hidden), FP32)
    norm = 1 + random_array(rng, (case.hidden,), FP32, 0.2)
    found = sharded_mlp([Core(case, weights, tp, rank) for rank in range(tp)], x, norm)
    assert error(found, reference.svd_mlp(x, weights, (norm, EPS))) <= MAX_ERROR["fp32"]


def test_every_rank_streams_its_share_of_the_weights():
    """Except for tile edges, a rank of tp holds 1/tp of the columns: no factor is replicated."""
    case = MLPCase(1, 2048, 8192, ("uv",) * 3, (1024, 1024, 1024))
    whole = mlp_layout(case.hidden, case.intermediate, *case.projections).stored_cols
    slots = 1024 // 4
    sharded = Projection("uv", 1024, slots)
    share = mlp_layout(case.hidden, case.intermediate // 4, sharded, sharded, sharded).stored_cols
    assert 4 * share == whole
