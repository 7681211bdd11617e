"""Folders of groups and narrow layers: written, read, refused where they contradict themselves; and the one
that needs no block.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from neuronmlp_plugin.checkpoint.digests import RECORD
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE, Checkpoint
from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.checkpoint.writer import write_factor_file, write_rest
from neuronmlp_plugin.commands.inspect import run as run_inspect
from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.models.definition import mlp
from neuronmlp_plugin.models.factors import DENSE, MLPLayer
from tests.checkpoint.test_folder import edit_config, edit_shard
from tests.tiny_models import FAMILIES, SHAPE, grouped_layers, write_dense, write_mixed

IDS = torch.tensor([[5, 17, 99, 4, 63, 12, 7, 3, 88], [9] * 9])
SLIM = (MLPLayer(SHAPE.hidden_size, 96, DENSE, DENSE, DENSE),) * SHAPE.num_layers


@pytest.fixture
def dense(tmp_path):
    return write_dense(tmp_path / "dense", "llama")


@pytest.fixture
def folder(tmp_path, dense):
    return write_mixed(tmp_path / "grouped", dense, layers=grouped_layers(4, int8=True))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_every_layer_of_the_model_is_the_definition(tmp_path, dense, groups):
    layers = grouped_layers(groups)
    folder = write_mixed(tmp_path / "grouped", dense, layers=layers)
    model, checkpoint = load_model(folder), Checkpoint(folder)
    assert checkpoint.block.layers == layers and checkpoint.block.groups == groups
    x = torch.randn(3, SHAPE.hidden_size)
    with torch.no_grad():
        for index, (module, layer) in enumerate(zip(model.model.layers, layers, strict=True)):
            tensors = {
                p: {s: checkpoint.tensor(f"model.layers.{index}.mlp.{p}.{s}") for s in m.tensor_shapes()}
                for p, m in layer.matrices.items()
            }
            torch.testing.assert_close(module.mlp(x), mlp(layer, tensors, x), rtol=1e-5, atol=1e-5)


def test_a_factor_file_holds_groups_and_narrow_layers_too(folder, dense):
    tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    (dense / FACTOR_FILE).parent.mkdir()
    write_factor_file(
        dense / FACTOR_FILE, Checkpoint(folder).block, {n: t for n, t in tensors.items() if ".mlp." in n}
    )
    with torch.no_grad():
        laid_over = load_model(dense, factors=dense / FACTOR_FILE)(IDS).logits
        assert torch.equal(laid_over, load_model(folder)(IDS).logits)


def test_inspect_says_which_sizes_are_served_at_full_speed(folder, capsys):
    arguments = type("Arguments", (), {"model": folder, "json": True, "verify": False})
    assert run_inspect(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["full_speed_tensor_parallel"] == [1, 2, 4]
    arguments.json = False
    assert run_inspect(arguments) == 0
    assert "Full speed at tensor-parallel sizes 1, 2, 4" in " ".join(capsys.readouterr().out.split())


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [  # one group of another rank, one of fewer channels
        (
            lambda t: t.update({f"{UP}.u.weight": t[f"{UP}.u.weight"][:-1].clone()}),
            r"expected shape \[36, 128\]",
        ),
        (
            lambda t: t.update({f"{UP}.v.weight": t[f"{UP}.v.weight"][:-48].clone()}),
            r"expected shape \[192, 9\]",
        ),
    ],
)
def test_groups_of_different_sizes_are_refused(folder, edit, message):
    edit_shard(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_kept_channels_that_contradict_the_tensors_are_refused(folder):
    layers = list(grouped_layers(4, int8=True))
    layers[2] = MLPLayer(SHAPE.hidden_size, 80, *layers[2].values(), groups=4)
    edit_config(folder, quantization_config=FormatBlock(tuple(layers), SHAPE).to_json())
    with pytest.raises(
        CheckpointError, match=r"model.layers.2.mlp.*expected shape \[80, 128\].*found \[64, 128\]"
    ):
        Checkpoint(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_slim_dense_layers_is_an_ordinary_one(tmp_path, family):
    """transformers loads it alone, and gives the logits of the model that our block would describe."""
    from transformers import AutoModelForCausalLM

    base = write_dense(tmp_path / "dense", family)
    folder = write_mixed(tmp_path / "slim", base, layers=SLIM)
    config = json.loads((folder / "config.json").read_text())
    assert config["intermediate_size"] == 96 and "quantization_config" not in config
    assert [path.name for path in folder.glob("neuronmlp*")] == [RECORD] and Checkpoint(folder).block is None
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {
        n: t for file in set(index["weight_map"].values()) for n, t in load_file(folder / file).items()
    }
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (SHAPE.hidden_size, 96)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
        torch.testing.assert_close(loaded, load_model(folder)(IDS).logits)


def test_finishing_an_ordinary_folder_twice_is_finishing_it_once(tmp_path, dense):
    """An interrupted run finds some shards renamed already."""
    folder = write_mixed(tmp_path / "slim", dense, layers=SLIM)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    first = "00001-of-00004.safetensors"
    (folder / f"model-{first}").rename(folder / f"neuronmlp-{first}")
    write_rest(folder, Checkpoint(dense), FormatBlock(SLIM, SHAPE, {}, "neuronmlp tests"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
