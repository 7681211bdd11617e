"""From how many tokens on vLLM's products take over: what the measured ratios decide, and what a chain does
with it.
"""

from __future__ import annotations

import importlib.util
import math
import shutil

import pytest
import torch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (see README, extra [cpu])"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]


@pytest.mark.parametrize(
    ("slower", "limit"),
    [
        ({}, math.inf),
        ({1: 1.24, 8: 1.24, 128: 1.24, 1024: 1.24}, math.inf),  # within what a busy machine errs by
        ({1024: 1.3}, 1024),
        ({128: 1.3, 1024: 1.3}, 128),
        ({1: 1.3}, 1),
    ],
)
def test_the_first_count_that_is_clearly_slower_is_the_limit(slower, limit, monkeypatch):
    from neuronmlp_plugin.serving.cpu import crossover

    monkeypatch.setattr(crossover, "SIZE", 32)
    monkeypatch.setattr(crossover, "_ratio", lambda _ours, _theirs, x: slower.get(len(x), 0.9))
    assert crossover.limit_of.__wrapped__(torch.bfloat16) == limit


def test_a_chain_hands_over_at_its_limit():
    from neuronmlp_plugin.models.definition import Weight
    from neuronmlp_plugin.serving.cpu.chain import INPUT, OUTPUT, Chain, Place

    weight = torch.randn(48, 32)
    chain = Chain(32, 48, torch.float32)
    chain.add(0, Weight(weight), Place(INPUT), Place(OUTPUT))
    seen = []
    product = chain.finish((16, lambda x: seen.append(len(x)) or x @ weight.T))
    for tokens in (1, 15, 16, 200):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(product(x), x @ weight.T, atol=1e-4, rtol=1e-4)
    assert seen == [16, 200]
