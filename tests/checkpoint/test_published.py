"""Their letters are the other way round: H, I and R all differ here, so that a swap cannot pass."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronmlp_plugin.checkpoint.conversion import convert_published
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.cli import main
from neuronmlp_plugin.errors import CheckpointError
from tests.tiny_models import SHAPE, write_dense

RANKS = {"gate": 11, "up": 13, "down": 17}


@pytest.fixture
def published(tmp_path):
    """A dense folder whose MLPs (all but the last layer's) are replaced by factors under the published
    names.
    """
    folder = write_dense(tmp_path / "published", "llama")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(SHAPE.num_layers - 1):
        for stem, rank in RANKS.items():
            weight = tensors.pop(f"model.layers.{layer}.mlp.{stem}_proj.weight")
            tensors[f"model.layers.{layer}.mlp.{stem}_v_proj.weight"] = (
                torch.randn(rank, weight.shape[1]) * 0.1
            )
            tensors[f"model.layers.{layer}.mlp.{stem}_u_proj.weight"] = (
                torch.randn(weight.shape[0], rank) * 0.1
            )
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_v_is_applied_first(published, tmp_path):
    (tmp_path / "out").mkdir()
    block = convert_published(published, tmp_path / "out")
    assert block.layers[0]["down_proj"].rank == 17 and block.layers[2]["down_proj"].form == "dense"
    model, theirs = load_model(tmp_path / "out"), load_file(published / "model.safetensors")
    x = torch.randn(4, SHAPE.hidden_size)
    v, u = (theirs[f"model.layers.1.mlp.gate_{letter}_proj.weight"] for letter in "vu")
    with torch.no_grad():
        torch.testing.assert_close(model.model.layers[1].mlp.gate_proj(x), (x @ v.T) @ u.T)


def test_the_command_converts_and_refuses_an_existing_folder(published, tmp_path, capsys):
    target = tmp_path / "out"
    assert main(["convert", str(published), "--out", str(target)]) == 0
    assert main(["convert", str(published), "--out", str(target)]) == 2
    assert "expected a path that does not exist yet" in capsys.readouterr().err


def test_a_missing_half_is_named_and_nothing_is_left(published, tmp_path):
    tensors = load_file(published / "model.safetensors")
    del tensors["model.layers.1.mlp.up_u_proj.weight"]
    save_file(tensors, published / "model.safetensors")
    (tmp_path / "direct").mkdir()
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_u_proj"):
        convert_published(published, tmp_path / "direct")
    assert main(["convert", str(published), "--out", str(tmp_path / "out")]) == 2
    assert not list(tmp_path.glob("out*"))


def test_a_dense_folder_has_nothing_to_convert(tmp_path):
    folder = write_dense(tmp_path / "dense", "qwen2")
    with pytest.raises(CheckpointError, match="expected factors named like"):
        convert_published(folder, tmp_path)
