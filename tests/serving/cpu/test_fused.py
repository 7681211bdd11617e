"""The compiled chains give what the definition gives, for every mix of forms, groups, token count and dtype,
ragged sizes included.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from neuronmlp_plugin.models.definition import Factors, Weight, bind, factors_of, quantize
from neuronmlp_plugin.models.factors import FORMS, PROJECTIONS, SCALE, MLPShape
from tests.models.layers import mix_layer, random_modules

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (see README, extra [cpu])"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]

WEIGHT_BF16, WEIGHT_INT8 = 1, 2  # as product.c numbers them


def owned(layer, dtype, int8):
    """Matrix and random factors of gate, up and down."""
    found = []
    for (projection, module), rounded in zip(random_modules(layer).items(), int8, strict=True):
        tensors = {}
        for name, weight in module.state_dict().items():
            if rounded:
                tensors[name], tensors[name + SCALE] = quantize(weight)
            else:
                tensors[name] = weight.to(dtype)
        found.append((layer.matrix(projection), factors_of(layer.matrix(projection), tensors)))
    return found


def wide(factors):
    """The same numbers in fp64, for the definition."""
    return Factors(
        *(
            None
            if weight is None
            else Weight(
                weight.values.double() * (1.0 if weight.scale is None else weight.scale.double()[:, None])
            )
            for weight in factors
        )
    )


@given(
    st.tuples(*[st.sampled_from(FORMS)] * 3),
    st.integers(2, 70),
    st.integers(2, 150),
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.tuples(*[st.booleans()] * 3),
    st.data(),
)
@settings(deadline=None, max_examples=200)
def test_chains_equal_the_definition(forms, hidden, width, groups, tokens, dtype, int8, data):
    from neuronmlp_plugin.serving.cpu.fused import fused_down, fused_gate_up, fused_mlp

    rank = data.draw(st.integers(1, min(hidden, width) - 1))
    shape = MLPShape(hidden, groups * width, 1)
    layer = mix_layer(forms, shape, ranks=dict.fromkeys(PROJECTIONS, rank), groups=groups)
    gate, up, down = owned(layer, dtype, int8)
    x, h = torch.randn(tokens, hidden, dtype=dtype), torch.randn(tokens, groups * width, dtype=dtype)
    expected = torch.cat([bind(matrix, wide(factors))(x.double()) for matrix, factors in (gate, up)], dim=-1)
    close(fused_gate_up(gate, up, dtype)(x), expected, dtype)
    expected = bind(down[0], wide(down[1]))(h.double())
    close(fused_down(down, dtype)(h), expected, dtype)
    on_gate, on_up = (bind(matrix, wide(factors))(x.double()) for matrix, factors in (gate, up))
    expected = bind(down[0], wide(down[1]))(torch.nn.functional.silu(on_gate) * on_up)
    close(fused_mlp(gate, up, down, dtype)(x), expected, dtype)


def close(got, expected, dtype):
    """Within the rounding of some stages, beside the largest output: bf16 rounds what it leaves in
    between.
    """
    assert got.dtype is dtype
    bound = (2e-5 if dtype is torch.float32 else 0.03) * float(expected.abs().max() + 1)
    assert float((got.double() - expected).abs().max()) <= bound


def test_weights_that_are_elsewhere_or_of_another_dtype_take_no_chain():
    from neuronmlp_plugin.serving.cpu.chain import usable

    assert usable(torch.device("cpu"), torch.float32)
    assert not usable(torch.device("cpu"), torch.float16)
    assert not usable(torch.device("meta"), torch.float32)


def test_packing_pads_the_last_panel_with_zeros():
    from neuronmlp_plugin.serving.cpu.chain import pack

    weight = torch.randn(21, 5)
    panels = pack(weight)
    assert panels.shape == (2, 5, 16)
    assert torch.equal(panels[1, :, 2], weight[18]) and not panels[1, :, 5:].any()


def test_weights_lie_one_after_the_other_in_the_order_in_which_they_are_read(monkeypatch):
    """So that what is fetched ahead of a product's end is the beginning of the next."""
    from neuronmlp_plugin.serving.cpu import chain as chains
    from neuronmlp_plugin.serving.cpu.fused import fused_mlp

    monkeypatch.setattr(chains, "_SHELF", [])  # a full one would part them
    ranks = dict.fromkeys(PROJECTIONS, 9)
    layer = mix_layer(("compact", "uv", "compact"), MLPShape(40, 96, 1), ranks=ranks, groups=2)
    chain = fused_mlp(*owned(layer, torch.bfloat16, (False, True, False)), torch.bfloat16)
    running = [chain.chain.products[i] for i in range(chain.chain.count)]
    assert [product.stage for product in running] == sorted(product.stage for product in running)
    sizes = {WEIGHT_BF16: lambda k: -(-k // 32) * 32 * 32, WEIGHT_INT8: lambda k: 16 * k}  # of a panel
    reads = [product for product in running if product.weight]
    for product, after in itertools.pairwise(reads):
        taken = -(-product.n // 16) * sizes[product.dtype](product.k)
        assert after.weight == product.weight + -(-taken // 64) * 64
    assert reads[0].weight % 64 == 0 and len(reads) == 2 + 4 + 2 + 1 + 2


@pytest.fixture
def compiled(monkeypatch):
    """The module that compiles, as if nothing had been compiled yet, and with its log where caplog sees
    it.
    """
    from neuronmlp_plugin.serving.cpu import compiled

    monkeypatch.setattr(compiled.logger, "propagate", True)
    compiled.load_products.cache_clear()
    yield compiled
    compiled.load_products.cache_clear()


def test_without_a_compiler_there_is_no_chain_and_the_log_says_so(compiled, monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert compiled.load_products() is None
    assert "no C compiler found" in caplog.text


def test_source_that_does_not_compile_is_told(compiled, monkeypatch, caplog, tmp_path):
    from neuronmlp_plugin.serving.cpu import library

    (tmp_path / "product.c").write_text("this is not C")
    monkeypatch.setattr(library, "SOURCE", tmp_path / "product.c")
    assert compiled.load_products() is None
    assert "could not be compiled" in caplog.text


def test_chains_share_the_thread_pool_of_torch():
    """A second OpenMP runtime would have its own threads wait for the cores that torch's threads hold."""
    program = """
import re, pathlib, torch, vllm.logger
def runtimes(): return set(re.findall(r"/\\S*lib(?:gomp|iomp)\\S*", pathlib.Path("/proc/self/maps").read_text()))
before = runtimes()
from neuronmlp_plugin.serving.cpu.compiled import load_products
assert load_products() is not None
assert runtimes() <= before | {name for name in runtimes() if "/torch/" in name}, runtimes() - before
assert any("/torch/" in name for name in runtimes())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
