"""vLLM's layers on several ranks, without an engine: what each loads, and what it asks of the others."""

from __future__ import annotations

import importlib.util
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neuronmlp_plugin.errors import CheckpointError, UsageError
from neuronmlp_plugin.models.definition import build_linear, mlp, quantize
from neuronmlp_plugin.models.factors import INT8, PROJECTIONS, SCALE, MLPLayer, MLPShape, ProjectionSpec
from neuronmlp_plugin.serving.options import Options
from tests.models.layers import MIXES, mix_layer
from tests.thread_group import ThreadGroup

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (see README, extra [cpu])"
    ),
]
SHAPE, T = MLPShape(32, 96, 1), 5
RANKS = {"gate_proj": 5, "up_proj": 7, "down_proj": 6}


def random_tensors(layer: MLPLayer) -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for projection, matrix in layer.matrices.items():
        tensors[projection] = {}
        for name, weight in build_linear(matrix).state_dict().items():
            if matrix.spec.is_int8:
                tensors[projection][name], tensors[projection][name + SCALE] = quantize(weight)
            else:
                tensors[projection][name] = weight
    return tensors


def loaded(method_class, collectives, layer, tensors, options, monkeypatch):
    """One of vLLM's layers with our method, its weights come in as vLLM brings them."""
    from neuronmlp_plugin.serving.cpu import linear_method

    monkeypatch.setattr(linear_method, "tensor_parallel", lambda: collectives)
    method, module = method_class("model.layers.0.mlp", layer, options, None), nn.Module()
    method.create_weights(module, 0, [], 0, 0, torch.float32)
    parameters = dict(module.named_parameters())
    for index, projection in enumerate(method.projections):
        for suffix, tensor in tensors[projection].items():
            parameters[suffix].weight_loader(parameters[suffix], tensor, index)
    method.process_weights_after_loading(module)
    return lambda x: method.apply(module, x)


@pytest.fixture(autouse=True)
def one_product_at_a_time(monkeypatch):
    """vLLM's ranks are processes, ours here are threads: its oneDNN products share one scratch memory."""
    from neuronmlp_plugin.serving.cpu import linear_method

    lock, prepacked_linear = threading.Lock(), linear_method.prepacked_linear

    def locked(weight, blocks=1):
        product = prepacked_linear(weight, blocks)

        def call(x):
            with lock:
                return product(x)

        return call

    monkeypatch.setattr(linear_method, "prepacked_linear", locked)


@torch.no_grad()
def run(layer, tp, tensors, x, options, monkeypatch):
    """`(y of each rank, log of collectives)`; the sum of y is vLLM's own, as behind its dense layers."""
    from neuronmlp_plugin.serving.cpu.linear_method import LowRankDownMethod, LowRankGateUpMethod

    group, ranks = ThreadGroup(tp), []
    group.run(ranks.append)
    ranks.sort(key=lambda rank: rank.rank)
    layers = [
        [
            loaded(m, rank, layer, tensors, options, monkeypatch)
            for m in (LowRankGateUpMethod, LowRankDownMethod)
        ]
        for rank in ranks
    ]

    @torch.no_grad()
    def work(rank):
        gate_up, down = layers[rank.rank]
        gate, up = gate_up(x).chunk(2, dim=-1)
        return rank.all_reduce(down(F.silu(gate) * up))

    return group.run(work), group.log


@pytest.mark.parametrize("how", ["fused", "prepacked", "plain"])
@pytest.mark.parametrize(("groups", "tp"), [(1, 1), (4, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_ranks_that_own_groups_pay_for_the_output_alone(mix, groups, tp, how, monkeypatch):
    """Of 64 of the 96 channels: counts and bytes of collectives are those of a dense layer."""
    from neuronmlp_plugin.serving.cpu import linear_method

    if how == "prepacked":  # as without a C compiler
        monkeypatch.setattr(linear_method, "usable", lambda *_: False)
    options = Options(fast_path=how != "plain")
    layer = mix_layer(mix, SHAPE, ranks=RANKS, channels=64, groups=groups)
    tensors, x = random_tensors(layer), torch.randn(T, SHAPE.hidden_size)
    outputs, log = run(layer, tp, tensors, x, options, monkeypatch)
    for y in outputs:
        torch.testing.assert_close(y, mlp(layer, tensors, x), rtol=1e-4, atol=1e-5)
    assert log == [("all_reduce", T * SHAPE.hidden_size * 4)]


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_ranks_read_their_share_of_int8_as_it_is(mix, monkeypatch):
    from neuronmlp_plugin.serving.cpu import linear_method
    from neuronmlp_plugin.serving.cpu.fused import fused_down

    seen = []
    monkeypatch.setattr(
        linear_method, "fused_down", lambda owned, *rest: seen.append(owned) or fused_down(owned, *rest)
    )
    layer = mix_layer(mix, SHAPE, ranks=RANKS, groups=4)
    layer = layer.with_specs({p: ProjectionSpec(s.form, s.rank, INT8) for p, s in layer.items()})
    tensors, x = random_tensors(layer), torch.randn(T, SHAPE.hidden_size)
    outputs, _ = run(layer, 2, tensors, x, Options(), monkeypatch)
    for y in outputs:
        torch.testing.assert_close(y, mlp(layer, tensors, x), rtol=1e-4, atol=1e-4)
    assert len(seen) == 2
    for matrix, factors in seen:
        kept = [weight for weight in factors if weight is not None]
        assert all(w.values.dtype is torch.int8 and w.values.is_contiguous() for w in kept)
        assert (
            sum(w.values.numel() for w in kept)
            == matrix.parameters
            == layer.matrix("down_proj").parameters / 2
        )


def test_one_group_is_shared_with_two_collectives_more(monkeypatch):
    layer = mix_layer(("compact", "uv", "compact"), SHAPE, ranks=RANKS)
    tensors, x = random_tensors(layer), torch.randn(T, SHAPE.hidden_size)
    outputs, log = run(layer, 2, tensors, x, Options(), monkeypatch)
    for y in outputs:
        torch.testing.assert_close(y, mlp(layer, tensors, x), rtol=1e-4, atol=1e-5)
    assert [name for name, _ in log] == ["all_gather", "reduce_scatter", "all_reduce"]


def test_a_size_that_cannot_serve_the_layer_is_refused_in_words(monkeypatch):
    layer = mix_layer(("compact", "uv", "compact"), SHAPE, ranks=RANKS, groups=4)
    words = r"tensor parallel size 3: expected a size that serves this MLP \(1, 2, 4 for its 4 groups\)"
    with pytest.raises(UsageError, match=words):
        run(layer, 3, random_tensors(layer), torch.randn(T, SHAPE.hidden_size), Options(), monkeypatch)


def test_a_tensor_of_other_channels_than_the_config_says_is_refused(monkeypatch):
    wide = mix_layer(("dense",) * 3, SHAPE)
    narrow = mix_layer(("dense",) * 3, SHAPE, channels=64)
    assert list(narrow) == list(PROJECTIONS)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight: expected \[64, 32\] .*found \[96, 32\]"):
        run(narrow, 1, random_tensors(wide), torch.randn(T, SHAPE.hidden_size), Options(), monkeypatch)
