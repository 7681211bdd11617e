"""What `bench mlp` runs in turns is the same MLP; no time is asserted."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from neuronmlp_plugin.bench.one_mlp import VLLM, _ours, _vllms, measure_mlp
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import UsageError
from tests.tiny_models import write_dense, write_mixed

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (see README, extra [cpu])"
    ),
]


@pytest.fixture
def folders(tmp_path):
    base = write_dense(tmp_path / "dense", "llama")
    return {"dense": base, "mixed": write_mixed(tmp_path / "mixed", base)}


def test_both_ways_compute_the_same(folders):
    dense = Checkpoint(folders["dense"])
    x = torch.randn(5, dense.config["hidden_size"])
    ours, theirs = (way(dense, 1, torch.float32)(x) for way in (_ours, _vllms))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_model_has_a_row_for_every_count_of_tokens(folders):
    ticks = []
    rows = measure_mlp(folders, [1, 3], dtype=torch.bfloat16, layers=9, rounds=2, tick=ticks.append)
    assert [(r.tokens, r.model) for r in rows] == [(t, m) for t in (1, 3) for m in (VLLM, "dense", "mixed")]
    assert all(r.us > 0 for r in rows) and sum(ticks) == 4
    assert [r.speedup for r in rows if r.model == VLLM] == [1.0, 1.0]


def test_the_first_model_is_dense(folders):
    swapped = dict(reversed(folders.items()))
    with pytest.raises(UsageError, match="expected a dense model as the first one"):
        measure_mlp(swapped, [1], dtype=torch.bfloat16, layers=1, rounds=1, tick=lambda _: None)
