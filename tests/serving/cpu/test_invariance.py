"""What a batch may change: nothing in fp32, and in bf16 nothing but which of two kernels runs. Bit for bit."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from neuronmlp_plugin.models.factors import FORMS, PROJECTIONS, MLPShape
from tests.models.layers import mix_layer
from tests.serving.cpu.test_fused import owned

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (see README, extra [cpu])"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]
TILES = 4  # tokens from which bf16 goes through tiles or pairs, as in product.c


def mlp(dtype, int8):
    """A served MLP of every form, ragged, in two groups."""
    from neuronmlp_plugin.serving.cpu.fused import fused_mlp

    torch.manual_seed(5)
    layer = mix_layer(
        tuple(FORMS)[:3], MLPShape(75, 2 * 61, 1), ranks=dict.fromkeys(PROJECTIONS, 27), groups=2
    )
    return fused_mlp(*owned(layer, dtype, (int8,) * 3), dtype)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("dtype", "counts"),
    [
        (torch.float32, (1, 2, 3, 5, 12, 23, 24, 33)),
        (torch.bfloat16, (TILES, 5, 16, 31, 32, 33, 64)),
        (torch.bfloat16, (1, 2, TILES - 1)),
    ],
    ids=["fp32", "bf16 batches", "bf16 few"],
)
def test_a_tokens_output_does_not_depend_on_the_others(dtype, counts, int8):
    run, x = mlp(dtype, int8), torch.randn(70, 75).to(dtype)
    whole = run(x[: max(counts)])
    for count in counts:
        for begin in range(0, max(counts) - count + 1, count):
            assert torch.equal(run(x[begin : begin + count]), whole[begin : begin + count]), (count, begin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nor_on_how_many_there_are_once_stages_run_token_block_by_token_block(dtype):
    run, x = mlp(dtype, int8=False), torch.randn(600, 75).to(dtype)
    whole = run(x)
    for begin in range(0, 600, 60):
        assert torch.equal(run(x[begin : begin + 60]), whole[begin : begin + 60]), begin


def test_two_runs_are_the_same():
    run, x = mlp(torch.bfloat16, True), torch.randn(40, 75).bfloat16()
    assert all(torch.equal(run(x), run(x)) for _ in range(5))
