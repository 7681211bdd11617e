"""The compiled chains give what the plain products give, for every mix of forms, token count and dtype,
ragged sizes included.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from neuronmlp_plugin.models.collectives import Collectives
from neuronmlp_plugin.models.int8 import quantize
from neuronmlp_plugin.models.parallel_mlp import Down, GateUp
from neuronmlp_plugin.models.projection import FORMS, PROJECTIONS, SCALE, MLPShape, ProjectionSpec
from neuronmlp_plugin.models.sharding import whole_shard
from tests.models.layers import random_modules

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (see README, extra [cpu])"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]


def shards_of(forms, hidden, intermediate, rank, dtype, int8):
    shape = MLPShape(hidden, intermediate, 1)
    specs = {
        p: ProjectionSpec(f, None if f == "dense" else rank) for p, f in zip(PROJECTIONS, forms, strict=True)
    }
    shards = []
    for (projection, module), rounded in zip(random_modules(specs, shape).items(), int8, strict=True):
        weights = {}
        for name, weight in module.state_dict().items():
            if rounded:
                weights[name], weights[name + SCALE] = quantize(weight)
            else:
                weights[name] = weight.to(dtype)
        shards.append(whole_shard(projection, specs[projection], weights))
    return shards[:2], shards[2]


def wide(shard):
    """The same shard in fp64, for the reference."""
    pairs = zip((shard.first, shard.second), shard.scales, strict=True)
    first, second = (
        w if w is None else w.double() * (1.0 if s is None else s.double()[:, None]) for w, s in pairs
    )
    return dataclasses.replace(shard, first=first, second=second)


@given(
    st.tuples(*[st.sampled_from(FORMS)] * 3),
    st.integers(2, 70),
    st.integers(2, 150),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.tuples(*[st.booleans()] * 3),
    st.data(),
)
@settings(deadline=None, max_examples=200)
def test_chains_equal_the_plain_products(forms, hidden, intermediate, tokens, dtype, int8, data):
    from neuronmlp_plugin.serving.cpu.fused import fused_down, fused_gate_up

    rank = data.draw(st.integers(1, min(hidden, intermediate) - 1))
    gate_up, down = shards_of(forms, hidden, intermediate, rank, dtype, int8)
    x, h = torch.randn(tokens, hidden, dtype=dtype), torch.randn(tokens, intermediate, dtype=dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 8e-3
    expected = GateUp([wide(s) for s in gate_up], intermediate, Collectives())(x.double())
    got = fused_gate_up(gate_up, intermediate)(x)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    expected = Down(wide(down), Collectives())(h.double())
    torch.testing.assert_close(
        fused_down(down, intermediate)(h).double(), expected, rtol=tolerance, atol=tolerance
    )


def test_weights_that_are_elsewhere_or_of_another_dtype_take_no_chain():
    from neuronmlp_plugin.serving.cpu.fused import usable

    assert usable(torch.device("cpu"), torch.float32)
    assert not usable(torch.device("cpu"), torch.float16)
    assert not usable(torch.device("meta"), torch.float32)


def test_packing_pads_the_last_panel_with_zeros():
    from neuronmlp_plugin.serving.cpu.fused import pack

    weight = torch.randn(21, 5)
    panels = pack(weight)
    assert panels.shape == (2, 5, 16)
    assert torch.equal(panels[1, :, 2], weight[18]) and not panels[1, :, 5:].any()


@pytest.fixture
def compiled(monkeypatch):
    """The module that compiles, as if nothing had been compiled yet, and with its log where caplog sees it."""
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
    (tmp_path / "product.c").write_text("this is not C")
    monkeypatch.setattr(compiled, "_SOURCE", tmp_path / "product.c")
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
