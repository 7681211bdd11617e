"""Real vLLM on this CPU gives the logits of the plain torch forward: every family, every form,
one rank and two.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE, Checkpoint
from neuronmlp_plugin.checkpoint.writer import write_factor_file
from neuronmlp_plugin.compressor.int8_folder import quantize_folder
from neuronmlp_plugin.compressor.job import ProgressBars
from tests.serving.engine import NEW_TOKENS, logits_of, run_engine, served_logits
from tests.tiny_models import FAMILIES, INT8_LAYERS, write_dense, write_mixed

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (see README, extra [cpu])"
    ),
]
TOLERANCE = 1e-3
OF_EACH_CLASS = ("llama", "qwen2")  # vLLM has two classes of MLP for the four families


def check(served, model) -> None:
    assert len(served) == 3
    for tokens, logits in served:
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0, :-1]
        assert logits.shape == expected.shape
        assert float((logits - expected).abs().max()) < TOLERANCE
        assert tokens[-NEW_TOKENS:] == expected[-NEW_TOKENS:].argmax(-1).tolist()


def mixed(tmp_path, family: str):
    return write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", family))


def ranks_of(family: str) -> list:
    """One rank and two; two of a family whose class of MLP another stands for only where `-m large` asks."""
    marks = [] if family in OF_EACH_CLASS else [pytest.mark.large]
    return [pytest.param(family, 1), pytest.param(family, 2, marks=marks)]


@pytest.mark.parametrize(
    ("family", "tensor_parallel"), [case for family in FAMILIES for case in ranks_of(family)]
)
def test_served_logits_equal_the_torch_forward(tmp_path, family, tensor_parallel):
    folder = mixed(tmp_path, family)
    check(served_logits(folder, tensor_parallel_size=tensor_parallel), load_model(folder))


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("family", OF_EACH_CLASS)
def test_int8_matrices_beside_others_give_the_logits_of_what_they_stand_for(
    tmp_path, family, tensor_parallel
):
    folder = write_mixed(tmp_path / "int8", write_dense(tmp_path / "dense", family), layers=INT8_LAYERS)
    check(served_logits(folder, tensor_parallel_size=tensor_parallel), load_model(folder))


@pytest.mark.parametrize("options", [{}, {"fast_path": False}], ids=str)
def test_a_dense_model_in_int8_is_served_and_the_log_says_how(tmp_path, options):
    folder = tmp_path / "int8"
    quantize_folder(write_dense(tmp_path / "dense", "llama"), folder, ProgressBars(Console(), quiet=True))
    process = run_engine(folder, additional_config={"neuronmlp": options})
    check(logits_of(process), load_model(folder))
    how = (
        "int8 weights expanded to torch.float32 at load"
        if options
        else "fused products, int8 weights read as they are"
    )
    log = process.stdout + process.stderr
    assert "9 dense, 9 of them int8; " in log and how in log


def test_dummy_weights_are_drawn_where_the_checkpoints_would_be_read(tmp_path):
    folder = write_mixed(tmp_path / "int8", write_dense(tmp_path / "dense", "llama"), layers=INT8_LAYERS)
    drawn, read = served_logits(folder, load_format="dummy"), served_logits(folder)
    for (_, mine), (_, others) in zip(drawn, read, strict=True):
        assert torch.isfinite(mine).all() and 0 < mine.abs().max() < others.abs().max()


def test_options_change_how_not_what(tmp_path):
    folder, options = mixed(tmp_path, "llama"), {"neuronmlp": {"fast_path": False}}
    process = run_engine(folder, tensor_parallel_size=2, additional_config=options, spawn=True)
    check(logits_of(process), load_model(folder))
    assert "plain torch products (fast_path is off)" in process.stdout + process.stderr


def test_compiled_graphs_give_the_same_logits(tmp_path):
    folder = mixed(tmp_path, "qwen3")
    check(served_logits(folder, enforce_eager=False), load_model(folder))


@pytest.fixture
def dense_with_factors(tmp_path):
    """A dense folder with the factors of another beside it."""
    base = write_dense(tmp_path / "dense", "llama")
    folder = write_mixed(tmp_path / "mixed", base, layers=INT8_LAYERS)
    block = Checkpoint(folder).block
    tensors = {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if ".mlp." in name
    }
    (base / FACTOR_FILE).parent.mkdir()
    write_factor_file(base / FACTOR_FILE, block, tensors)
    return base


def test_a_factor_file_is_switched_on_by_flags_alone(dense_with_factors):
    base = dense_with_factors
    check(served_logits(base), load_model(base))
    with_factors = load_model(base, factors=base / FACTOR_FILE)
    check(served_logits(base, quantization="neuronmlp"), with_factors)
    moved = (base / FACTOR_FILE).rename(base.parent / "elsewhere.safetensors")
    check(
        served_logits(
            base, quantization="neuronmlp", additional_config={"neuronmlp": {"factors": str(moved)}}
        ),
        with_factors,
    )
    overrides = {"quantization_config": {"quant_method": "neuronmlp"}}
    check(
        served_logits(base, hf_overrides=overrides, additional_config={"neuronmlp": {"factors": str(moved)}}),
        with_factors,
    )


def damage(folder, edit, name="neuronmlp-00001-of-00004.safetensors"):
    path = folder / name
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def drop_a_factor(folder):
    damage(folder, lambda t: t.pop("model.layers.0.mlp.up_proj.u.weight"))


def drop_the_embeddings(folder):
    damage(folder, lambda t: t.pop("model.embed_tokens.weight"), "neuronmlp-00004-of-00004.safetensors")


def put_a_nan(folder):
    damage(folder, lambda t: t["model.layers.0.mlp.up_proj.u.weight"][0].fill_(float("nan")))


def change_the_version(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 7
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (drop_a_factor, {}, "expected a tensor model.layers.0.mlp.up_proj.u.weight"),
        (drop_the_embeddings, {}, "expected a tensor model.embed_tokens.weight"),
        (put_a_nan, {}, "model.layers.0.mlp.up_proj.u.weight: expected finite weights"),
        (change_the_version, {}, "expected neuronmlp format_version 1, found 7"),
        (None, {"tp_scheme": "reduce"}, "expected an object with the keys factors, fast_path"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(tmp_path, spoil, options, message):
    folder = mixed(tmp_path, "llama")
    if spoil is not None:
        spoil(folder)
    process = run_engine(folder, additional_config={"neuronmlp": options})
    assert process.returncode != 0
    assert message in process.stderr + process.stdout


def test_the_log_says_what_runs(tmp_path):
    process = run_engine(mixed(tmp_path, "mistral"))
    log = process.stdout + process.stderr
    assert "of the MLP parameters removed by the checkpoint; 3 compact, 3 dense, 3 uv; fused products" in log
    assert "the norm before an MLP is a part of its fused products" in log
