"""The norm in front of an MLP, in one call with it: vLLM's own numbers, and only in layers that are known to
end in the two.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil

import pytest
import torch
from torch import nn

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
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
VLLM = "vllm.model_executor"
EPSILON = 1e-3


@pytest.fixture(autouse=True)
def vllm_config():
    """vLLM's modules ask for one as they are built."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        yield


def vllms_norm(hidden, dtype, kind="RMSNorm", **options):
    norm = getattr(importlib.import_module(f"{VLLM}.layers.layernorm"), kind)(hidden, EPSILON, **options)
    norm.weight = nn.Parameter(torch.rand(hidden).to(dtype))
    return norm


def chain_of(hidden, dtype, large=None):
    from neuronmlp_plugin.serving.cpu.fused import fused_mlp

    ranks = dict.fromkeys(PROJECTIONS, min(hidden, 48) // 2)
    layer = mix_layer(tuple(FORMS)[:3], MLPShape(hidden, 96, 1), ranks=ranks, groups=2)
    return fused_mlp(*owned(layer, dtype, (False, True, False)), dtype, large)


class Layer(nn.Module):
    """A decoder layer of vLLM's, as far as its end."""

    def __init__(self, norm, mlp):
        super().__init__()
        self.post_attention_layernorm, self.mlp, self.gate = norm, mlp, None

    def forward(self, hidden_states, residual):
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        if self.gate is not None:
            hidden_states = hidden_states * self.gate
        hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class TwiceNormed(Layer):
    def forward(self, hidden_states, residual):
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


@DTYPES
@pytest.mark.parametrize("hidden", [2, 75, 96])
@pytest.mark.parametrize("tokens", [0, 1, 5, 40, 300])
def test_one_call_gives_what_vllms_norm_and_the_products_give(hidden, tokens, dtype):
    """The residual bit for bit; the rest but for the order in which squares are summed."""
    from neuronmlp_plugin.serving.cpu.normed import take_norm

    norm, chain = vllms_norm(hidden, dtype), chain_of(hidden, dtype)
    layer = Layer(norm, nn.Identity())
    x, residual = torch.randn(tokens, hidden).to(dtype), 3 * torch.randn(tokens, hidden).to(dtype)
    normed, added = norm(x.clone(), residual.clone())
    expected = chain(normed)
    assert take_norm(layer, layer.mlp, chain)
    assert [name for name, _ in layer.named_parameters()] == ["post_attention_layernorm.weight"]
    y, new = layer(x.clone(), residual.clone())
    assert torch.equal(new, added) and y.dtype is dtype
    bound = (1e-5 if dtype is torch.float32 else 2e-2) * (expected.abs().max() + 1 if tokens else 1)
    assert ((y - expected).abs() <= bound).all()


@DTYPES
@pytest.mark.parametrize("hidden", [2, 75, 96])
def test_the_first_norm_of_such_a_layer_is_one_call_too(hidden, dtype):
    from neuronmlp_plugin.serving.cpu.normed import take_norm

    first, chain = vllms_norm(hidden, dtype), chain_of(hidden, dtype)
    layer = Layer(vllms_norm(hidden, dtype), nn.Identity())
    layer.input_layernorm = first
    assert take_norm(layer, layer.mlp, chain)
    assert layer.input_layernorm is not first and layer.input_layernorm.weight is first.weight
    x, residual = torch.randn(2, 7, hidden).to(dtype)
    assert torch.equal(layer.input_layernorm(x), first(x))
    for some in (x, x.double()):  # of another dtype it is vLLM's
        normed, added = first(some.clone(), residual.clone().to(some.dtype))
        y, new = layer.input_layernorm(some.clone(), residual.clone().to(some.dtype))
        assert torch.equal(new, added) and y.dtype is some.dtype
        torch.testing.assert_close(y, normed, atol=2e-2, rtol=1e-2)


@DTYPES
def test_rows_that_are_strided_or_of_many_tokens_are_normed_too(dtype):
    from neuronmlp_plugin.serving.cpu.normed import NormedMLP

    norm, chain = vllms_norm(48, dtype), chain_of(48, dtype, (7.0, lambda normed: normed + 1))
    both = NormedMLP(norm, chain)
    wide, residual = torch.randn(9, 96).to(dtype), torch.randn(9, 96).to(dtype)
    normed, added = norm(wide[:, ::2].contiguous(), residual[:, ::2].contiguous())
    y, new = both(wide[:4, ::2], residual[:4, ::2])
    assert torch.equal(new, added[:4])
    torch.testing.assert_close(y, chain(normed[:4]), atol=2e-2, rtol=2e-2)
    y, new = both(wide[:, ::2], residual[:, ::2])  # the other way, from 7 tokens on
    assert torch.equal(new, added) and torch.equal(y, normed + 1)


@DTYPES
def test_a_tokens_norm_does_not_depend_on_the_others(dtype):
    from neuronmlp_plugin.serving.cpu.normed import NormedMLP

    both = NormedMLP(vllms_norm(75, dtype), chain_of(75, dtype))
    x, residual = torch.randn(24, 75).to(dtype), torch.randn(24, 75).to(dtype)
    whole = both(x.clone(), residual.clone())
    parts = [both(x[at : at + 8].clone(), residual[at : at + 8].clone()) for at in range(0, 24, 8)]
    for all_rows, some in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(all_rows, torch.cat(some))


@pytest.mark.parametrize(
    ("module", "name", "lacks", "ends"),
    [
        ("llama", "LlamaDecoderLayer", {}, True),
        ("mistral", "MistralDecoderLayer", {"ada_rms_norm_t_cond": None}, True),
        ("mistral", "MistralDecoderLayer", {"ada_rms_norm_t_cond": 1}, False),
        ("qwen2", "Qwen2DecoderLayer", {}, True),
        ("qwen3", "Qwen3DecoderLayer", {}, True),
        ("gemma2", "Gemma2DecoderLayer", {}, False),  # norms behind the MLP
        ("commandr", "CohereDecoderLayer", {}, False),  # attention beside the MLP
    ],
)
def test_which_of_vllms_layers_end_in_norm_and_mlp(module, name, lacks, ends):
    from neuronmlp_plugin.serving.cpu.normed import ends_in_mlp

    kind = getattr(importlib.import_module(f"{VLLM}.models.{module}"), name)
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    vars(layer).update(lacks)
    assert ends_in_mlp(layer) is ends


def gated(layer):
    layer.gate = 2.0


def of_another_mlp(layer):
    layer.mlp = nn.Identity()


def of_another_dtype(layer):
    layer.post_attention_layernorm.weight = nn.Parameter(torch.ones(48, dtype=torch.bfloat16))


def over_a_part(layer):
    layer.post_attention_layernorm = vllms_norm(48, torch.float32, var_hidden_size=24)


def of_another_kind(layer):
    layer.post_attention_layernorm = vllms_norm(48, torch.float32, "GemmaRMSNorm")


def twice(layer):
    layer.__class__ = TwiceNormed


@pytest.mark.parametrize(
    "change", [gated, of_another_mlp, of_another_dtype, over_a_part, of_another_kind, twice]
)
def test_a_norm_of_another_layer_stays_vllms(change):
    from neuronmlp_plugin.serving.cpu.normed import take_norm

    mlp, chain = nn.Identity(), chain_of(48, torch.float32)
    layer = Layer(vllms_norm(48, torch.float32), mlp)
    change(layer)
    norm = layer.post_attention_layernorm
    assert not take_norm(layer, mlp, chain)
    assert layer.post_attention_layernorm is norm
    assert not take_norm(None, mlp, chain)
