"""Real vLLM on this CPU at one, two and four ranks gives the logits of the torch forward for folders of
groups and narrow layers, int8 among them.
"""

from __future__ import annotations

import importlib.util

import pytest

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.models.factors import DENSE, MLPLayer, ProjectionSpec
from tests.serving.cpu.test_engine import check
from tests.serving.engine import logits_of, run_engine
from tests.tiny_models import SHAPE, grouped_layers, write_dense, write_mixed

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (see README, extra [cpu])"
    ),
]


def grouped(tmp_path, groups, int8=False, family="llama"):
    base = write_dense(tmp_path / "dense", family)
    return write_mixed(tmp_path / "grouped", base, layers=grouped_layers(groups, int8))


# (groups, ranks, int8, without torch.compile): few engines, each of which mixes much.
ENGINES = (
    (1, 1, False, True),
    (8, 1, True, True),
    (2, 2, True, True),
    (4, 2, False, False),
    (1, 4, False, True),
    (8, 4, True, True),
    pytest.param(4, 4, False, True, marks=pytest.mark.large),  # five processes to start
)


@pytest.mark.parametrize(("groups", "ranks", "int8", "eager"), ENGINES)
def test_served_logits_equal_the_torch_forward(tmp_path, groups, ranks, int8, eager):
    folder = grouped(tmp_path, groups, int8, "qwen3" if eager else "llama")
    process = run_engine(folder, tensor_parallel_size=ranks, enforce_eager=eager)
    check(logits_of(process), load_model(folder))
    log = process.stdout + process.stderr
    if groups == 1 and ranks > 1:
        assert f"{ranks} ranks share one group's factors" in log
    else:
        int8_words = ", int8 weights read as they are" if int8 else ""
        own = "" if ranks == 1 else f", {ranks} ranks own whole groups"
        assert f"fused products{int8_words}{own}" in log


def test_ranks_that_cannot_serve_the_groups_are_refused_in_words(tmp_path):
    three = (MLPLayer(SHAPE.hidden_size, 192, ProjectionSpec("uv", 9), DENSE, DENSE, 3),) * SHAPE.num_layers
    folder = write_mixed(tmp_path / "three", write_dense(tmp_path / "dense", "llama"), layers=three)
    process = run_engine(folder, tensor_parallel_size=2)
    assert process.returncode != 0
    words = (
        "tensor parallel size 2: expected a size that serves this MLP (1, 3 for its 3 groups), found another"
    )
    assert words in process.stdout + process.stderr


def test_any_engine_serves_an_ordinary_folder_without_the_plugin(tmp_path, monkeypatch):
    slim = (MLPLayer(SHAPE.hidden_size, 96, DENSE, DENSE, DENSE),) * SHAPE.num_layers
    folder = write_mixed(tmp_path / "slim", write_dense(tmp_path / "dense", "llama"), layers=slim)
    monkeypatch.setenv("VLLM_PLUGINS", "")
    process = run_engine(folder)
    check(logits_of(process), load_model(folder))
    assert "neuronmlp:" not in process.stdout + process.stderr  # how each line of our log begins
