"""The exact tensors that NxDI's module hands to the kernels go through the simulator, rank by rank, and sum
to the plain answer.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuronmlp_plugin.models.factors import MLPShape
from neuronmlp_plugin.serving.trainium.kernel_path import own_first, pack_norm_in_graph, rank_major
from nki_kernels.kernels.sharded import last_factor
from nki_kernels.packing import pack_norm
from tests.models.layers import MIXES, mix_layer, plain_mlp, random_modules, stored_tensors
from tests.serving.trainium.sharded import TORCH, rank_mlp, run_kernels
from tests.thread_group import ThreadGroup

SHAPE = MLPShape(hidden_size=20, intermediate_size=48, num_layers=1)


@torch.no_grad()
def run(mix, tp, x, norm=None, groups=1):
    """`(outputs by rank, launches of rank 0, collectives, the plain answer)`, in the dtype of x."""
    layer = mix_layer(mix, SHAPE)
    if groups > 1:
        layer = mix_layer(mix, SHAPE, ranks=dict.fromkeys(layer, 5), channels=36, groups=groups)
    modules = {name: module.to(x.dtype) for name, module in random_modules(layer).items()}
    ran = run_kernels(layer, stored_tensors(layer, modules), tp, x, norm)
    return ran.outputs, ran.launches, ran.collectives, plain_mlp(modules, x)


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_the_kernels_give_the_plain_answer_at_every_rank(mix, tp):
    """Ranks 13, 8 and 11: tp 2 and 3 divide none or one of them."""
    x = torch.randn(2, 3, SHAPE.hidden_size)
    outputs, _, _, expected = run(mix, tp, x)
    for y in outputs:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tp", "groups"), [(2, 2), (3, 3), (2, 4), (2, 6), (3, 6)])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_a_rank_with_groups_of_its_own_is_one_launch_and_the_sum_of_y(mix, tp, groups):
    x = torch.randn(2, 3, SHAPE.hidden_size)
    outputs, launches, collectives, expected = run(mix, tp, x, groups=groups)
    for y in outputs:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert launches == ["svd_mlp"] and collectives == [("all_reduce", x.numel() * 4)]


@pytest.mark.parametrize("tp", [1, 2])
def test_bf16_travels_as_bf16(tp):
    x = torch.randn(1, 5, SHAPE.hidden_size).bfloat16()
    outputs, _, _, expected = run(("compact", "uv", "compact"), tp, x)
    for y in outputs:
        assert y.dtype == torch.bfloat16
        assert float((y - expected).float().norm() / expected.float().norm()) < 0.02


class RMSNorm(torch.nn.Module):
    """NxDI's, by the names of its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(SHAPE.hidden_size) + 0.5)
        self.variance_epsilon = 0.01

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "mix", [("compact", "uv", "compact"), ("dense", "uv", "dense"), ("dense", "dense", "uv")], ids="-".join
)
def test_a_norm_that_nxdi_hands_over_runs_in_the_kernels(mix, tp):
    norm, x = RMSNorm(), torch.randn(2, 3, SHAPE.hidden_size)
    outputs, _, _, _ = run(mix, tp, x, norm)
    plain = run(mix, 1, norm(x).detach())[3]
    for y in outputs:
        torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)


def test_a_norm_is_packed_as_the_kernels_packer_packs_it():
    weight = torch.rand(300)
    assert np.array_equal(pack_norm_in_graph(weight).numpy(), pack_norm(weight.numpy()))


def test_one_launch_without_and_three_with_tensor_parallelism():
    x = torch.randn(1, 4, SHAPE.hidden_size)
    assert run(("compact", "uv", "compact"), 1, x)[1] == ["svd_mlp"]
    assert run(("compact", "uv", "compact"), 2, x)[1] == [
        "first_factors",
        "second_factors",
        last_factor.__name__,
    ]
    assert run(("dense", "dense", "dense"), 2, x)[1] == ["svd_mlp"]


def test_the_kernels_move_what_the_torch_path_moves():
    x = torch.randn(1, 4, SHAPE.hidden_size)
    layer = mix_layer(("compact", "uv", "compact"), SHAPE)
    tensors = stored_tensors(layer, random_modules(layer))
    group = ThreadGroup(2)
    group.run(lambda collectives: torch.no_grad()(rank_mlp(layer, tensors, collectives, decisions=TORCH))(x))
    assert run(("compact", "uv", "compact"), 2, x)[2] == group.log


def test_own_first_turns_the_ring_and_back():
    z = torch.arange(12.0).reshape(6, 2)
    turned = own_first(z, torch.tensor([1]), 3)
    assert turned[:, 0].tolist() == [4.0, 6.0, 8.0, 10.0, 0.0, 2.0]
    assert torch.equal(rank_major(turned, torch.tensor([1]), 3), z)
