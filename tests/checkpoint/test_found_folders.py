"""Dense folders as people have them: what can be read is read, and what cannot is told by what it is."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronmlp_plugin.checkpoint.hub import files_to_copy
from neuronmlp_plugin.checkpoint.loader import build_skeleton, load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint, dense_block
from neuronmlp_plugin.cli import main
from neuronmlp_plugin.errors import CheckpointError
from tests.tiny_models import write_dense, write_mixed

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def dense(tmp_path):
    return write_dense(tmp_path / "dense", "qwen2")


def edit(folder, change):
    """Write the tensors again, as `change` leaves them."""
    path = folder / "model.safetensors"
    save_file(change({name: tensor.clone() for name, tensor in load_file(path).items()}), path)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {f"_orig_mod.{n}": x for n, x in t.items()}, r"found _orig_mod\.model\.embed_tokens"),
        (lambda t: {n.removeprefix("model."): x for n, x in t.items()}, r"found embed_tokens\.weight; save"),
        (lambda t: {n.replace("q_proj.weight", "q_proj.qweight"): x for n, x in t.items()}, "a quantised mo"),
        (lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"}, "if the embedding is the head"),
        (lambda t: {n: x for n, x in t.items() if ".2." not in n}, "or its config is another model's"),
    ],
    ids=["prefix", "no prefix", "quantised", "head", "layers"],
)
def test_a_tensor_that_is_missing_is_told_with_what_is_there(dense, change, message):
    edit(dense, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(dense)


@pytest.mark.parametrize(
    ("extra", "config", "message"),
    [
        ({"v_head.weight": torch.zeros(1, 128)}, {}, "expected no tensor v_head.weight"),
        ({"model.layers.0.self_attn.o_proj.bias": torch.zeros(128)}, {}, "expected no tensor .*o_proj.bias"),
        ({}, {"vocab_size": 100}, r"expected shape \[100, 128\] \(from the config\), found \[128, 128\]"),
        ({}, {"num_key_value_heads": 4}, r"k_proj\.\w+: expected shape \[128.* found \[64"),
    ],
    ids=["head", "bias", "vocabulary", "heads"],
)
def test_a_config_that_contradicts_its_tensors_is_told_before_the_work(
    dense, tmp_path, capsys, extra, config, message
):
    edit(dense, lambda tensors: {**tensors, **extra})
    edit_config(dense, **config)
    with pytest.raises(CheckpointError, match=message):
        build_skeleton(Checkpoint(dense))
    assert main(["quantize", str(dense), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert not list(tmp_path.glob("out*")) and capsys.readouterr().err.count("\n") == 1


def test_layers_beyond_the_config_are_refused(dense):
    edit_config(dense, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"expected no tensor model\.layers\.2\..* mend the config"):
        dense_block(Checkpoint(dense))


@torch.no_grad()
def test_a_tied_model_may_have_its_one_matrix_under_the_name_of_the_head(tmp_path):
    folder = write_dense(tmp_path / "dense", "llama")
    ids = torch.arange(3, 14)[None]
    expected = load_model(folder)(ids).logits
    edit(folder, lambda t: {n.replace("model.embed_tokens", "lm_head"): x for n, x in t.items()})
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    assert torch.equal(load_model(folder)(ids).logits, expected)
    made = Checkpoint(write_mixed(tmp_path / "mixed", Checkpoint(folder).folder))
    assert "model.embed_tokens.weight" in made.names() and "lm_head.weight" not in made.names()


@torch.no_grad()
@pytest.mark.parametrize("key", ["output_attentions", "output_hidden_states", "torchscript"])
def test_what_a_config_wants_returned_changes_nothing(dense, key):
    ids = torch.arange(3, 14)[None]
    expected = load_model(dense)(ids).logits
    edit_config(dense, **{key: True, "return_dict": False})
    assert torch.equal(load_model(dense)(ids).logits, expected)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-Q4_K_M.gguf"])
def test_weights_of_another_format_are_named(dense, name):
    (dense / "model.safetensors").rename(dense / name)
    with pytest.raises(CheckpointError, match=f"found {name}, and such files are never read; save the model"):
        Checkpoint(dense)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE"])
def test_a_pointer_of_git_lfs_is_called_one(dense, tmp_path, capsys, name):
    (dense / name).write_text(POINTER)
    assert main(["quantize", str(dense), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert f"{name}: expected the file itself, found a pointer of Git LFS" in capsys.readouterr().err


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_no_model_and_no_part_of_one(dense, alone):
    (dense / "adapter_config.json").write_text("{}")
    if alone:
        (dense / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: expected a model by itself, found an "):
        Checkpoint(dense)


def test_what_macos_leaves_beside_files_is_not_read(dense, tmp_path):
    mixed = write_mixed(tmp_path / "mixed", dense)
    (mixed / "._neuronmlp-00001-of-00004.safetensors").write_bytes(b"\0\5\x16\7" * 20)
    assert main(["inspect", "--verify", str(mixed)]) == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64], ids=str)
def test_numbers_of_another_kind_are_told_with_what_to_do(dense, dtype):
    edit(dense, lambda t: {n: x.to(dtype) if "up_proj" in n else x for n, x in t.items()})
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight: expected bf16, .*; save the model in one of "
    ):
        load_model(dense)


def test_a_path_that_is_too_long_or_a_home_is_understood(dense, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "x" * 300])
    assert main(["quantize", str(dense), "--out", str(dense.parent / ("y" * 250))]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    monkeypatch.setenv("HOME", str(dense.parent))
    monkeypatch.chdir(dense)
    assert main(["quantize", "~/dense", "--out", "~/out", "--quiet"]) == 0
    assert (dense.parent / "out").is_dir() and not os.path.exists("~")


def test_a_folder_may_be_made_of_links(tmp_path):
    folder, store, disk = tmp_path / "model", tmp_path / "models--owner--model" / "blobs", tmp_path / "disk"
    folder.mkdir()
    store.mkdir(parents=True)
    disk.mkdir()
    for name in ("config.json", "NOTICE"):
        (disk / name).write_text("on another disk, all in one place")
        (folder / name).symlink_to(disk / name)
    (store / "0123").write_text("what an older `huggingface-cli download --local-dir` links to")
    (folder / "tokenizer.json").symlink_to(store / "0123")
    assert [path.name for path in files_to_copy(folder)] == ["NOTICE", "tokenizer.json"]
