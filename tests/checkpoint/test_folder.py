"""A folder written is the folder read; a folder damaged in any way is refused with its file named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.writer import portable_config
from neuronmlp_plugin.errors import CheckpointError, NonFiniteError, UnsupportedModelError
from tests.letters import write_tokenizer
from tests.tiny_models import FAMILIES, write_dense, write_mixed

SHARD = "neuronmlp-00001-of-00004.safetensors"


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def mixed(tmp_path):
    base = write_dense(tmp_path / "dense", "llama")
    write_tokenizer(base)
    return write_mixed(tmp_path / "mixed", base)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_shard(folder, edit, name=SHARD):
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)


def test_dense_loading_equals_transformers(tmp_path, family):
    from transformers import AutoModelForCausalLM

    folder = write_dense(tmp_path, family)
    ids = torch.randint(3, 128, (2, 11))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(load_model(folder)(ids).logits, expected)


def test_factored_loading_equals_the_dense_matrices_that_the_factors_stand_for(tmp_path, family):
    base = write_dense(tmp_path / "dense", family)
    folder = write_mixed(tmp_path / "mixed", base)
    model, plain = load_model(folder), load_model(base)
    with torch.no_grad():
        for layer, target in zip(model.model.layers, plain.model.layers, strict=True):
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(target.mlp, name).weight
                weight.copy_(getattr(layer.mlp, name)(torch.eye(weight.shape[1])).T)
        ids = torch.randint(3, 128, (2, 11))
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_tokenizer_files_are_copied_and_portable(mixed):
    settings = json.loads((mixed / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (mixed / "tokenizer.json").read_bytes() == (mixed.parent / "dense" / "tokenizer.json").read_bytes()


def test_the_config_speaks_to_transformers_4_and_5():
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}, "dtype": "bfloat16"}
    old = portable_config(new)
    assert (old["rope_theta"], old["torch_dtype"]) == (5e5, "bfloat16")
    assert old["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert "rope_scaling" not in portable_config(
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    )


@pytest.mark.parametrize(
    "older", [{}, {"rope_theta": 5e5}, {"rope_scaling": {"type": "linear", "factor": 2.0}}]
)
def test_a_config_that_says_its_rope_twice_keeps_its_meaning(tmp_path, older):
    """Transformers 5 takes `rope_theta` from `rope_parameters`, unless there is a `rope_scaling`."""
    from transformers import AutoConfig

    folder = write_dense(tmp_path, "llama")
    edit_config(folder, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}, **older)
    before = AutoConfig.from_pretrained(folder).rope_parameters
    edit_config(folder, **portable_config(json.loads((folder / "config.json").read_text())))
    assert AutoConfig.from_pretrained(folder).rope_parameters == before


def test_sharded_dense_folders_are_read(tmp_path):
    folder = write_dense(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in halves.items():
        save_file({n: tensors[n] for n in chosen}, folder / file)
    index = {"weight_map": {n: file for file, chosen in halves.items() for n in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint(folder).names() == names
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected b\.safetensors"):
        Checkpoint(folder)


NAME = "model.layers.0.mlp.up_proj.u.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NAME), f"expected a tensor {NAME} .*found none"),
        (lambda t: t.update({NAME.replace("u.w", "a.w"): t.pop(NAME)}), f"expected a tensor {NAME}"),
        (lambda t: t.update({NAME: t[NAME][:-1].clone()}), r"expected shape \[21, 128\] .*found \[20, 128\]"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(192, 128)}),
            "expected no tensor",
        ),
    ],
    ids=["missing", "misnamed", "misshapen", "beside"],
)
def test_factors_that_contradict_the_config_are_refused(mixed, edit, message):
    edit_shard(mixed, edit)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(mixed)


def test_any_tensor_outside_the_mlps_that_is_missing_is_refused(tmp_path, family):
    """An engine would serve what its memory happens to hold."""
    folder = write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", family))
    kept = {
        name: path for path in folder.glob("*.safetensors") for name in load_file(path) if ".mlp." not in name
    }
    assert (
        sorted(kept) == sorted(n for n in Checkpoint(folder).names() if ".mlp." not in n) and len(kept) >= 20
    )
    for name, path in kept.items():
        whole = path.read_bytes()
        edit_shard(folder, lambda t, name=name: t.pop(name), path.name)
        with pytest.raises(CheckpointError, match=f"expected a tensor {name} .*the folder is incomplete"):
            Checkpoint(folder)
        path.write_bytes(whole)


@pytest.mark.parametrize("position", range(1, 5))
def test_a_shard_that_is_missing_is_refused(mixed, position):
    name = f"neuronmlp-0000{position}-of-00004.safetensors"
    (mixed / name).unlink()
    with pytest.raises(CheckpointError, match=f"expected {name}, found no such file"):
        Checkpoint(mixed)


def test_other_files_beside_model_safetensors_are_not_read(tmp_path):
    folder = write_dense(tmp_path, "llama")
    names = Checkpoint(folder).names()
    save_file({"tok_embeddings.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    assert Checkpoint(folder).names() == names


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "[" * 100_000),
        ("config.json", "\udcff"),
        ("config.json", "[]"),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../elsewhere/model.safetensors"}}'),
    ],
)
def test_json_that_is_something_else_is_refused(mixed, file, text):
    (mixed / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=file):
        Checkpoint(mixed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"removed_ratio": float("nan")}, "no number of JSON"),
        ({"format_version": True}, "expected neuronmlp format_version"),
        ({"format_version": 1.0}, "expected neuronmlp format_version"),
        ({"provenance": [1, 2]}, "expected `provenance` to be an object"),
        (["quant_method"], "expected no quantization_config"),
        ("neuronmlp", "expected no quantization_config"),
    ],
    ids=str,
)
def test_a_block_of_another_kind_is_refused(mixed, changes, message):
    block = json.loads((mixed / "config.json").read_text())["quantization_config"]
    edit_config(mixed, quantization_config={**block, **changes} if isinstance(changes, dict) else changes)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(mixed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_factors_are_refused(mixed, value):
    edit_shard(mixed, lambda t: t[NAME].fill_(value))
    with pytest.raises(NonFiniteError, match=f"{SHARD}: {NAME}"):
        load_model(mixed)


@pytest.mark.parametrize(
    ("dtype", "found"), [(torch.int8, "I8"), (torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3")], ids=str
)
def test_weights_of_other_kinds_are_refused(mixed, dtype, found):
    edit_shard(mixed, lambda t: t.update({NAME: t[NAME].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"expected bf16, fp16 or fp32 .*found {found}"):
        Checkpoint(mixed)


def test_a_truncated_file_is_refused(mixed):
    data = (mixed / SHARD).read_bytes()
    (mixed / SHARD).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=f"{SHARD}: expected a whole safetensors file"):
        Checkpoint(mixed)


def test_a_tensor_in_two_files_is_refused(mixed):
    save_file({NAME: torch.zeros(2)}, mixed / "stale.safetensors")
    with pytest.raises(CheckpointError, match="remove the stale file"):
        Checkpoint(mixed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "expected an architecture of Llama"),
        ({"architectures": None}, "expected an architecture"),
        ({"architectures": {"a": 1}}, "expected an architecture"),
        ({"architectures": 3}, "expected an architecture"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "remote code is never run"),
        ({"mlp_bias": True}, "MLPs without bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'silu'"),
    ],
)
def test_unsupported_models_are_refused(mixed, changes, message):
    edit_config(mixed, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        Checkpoint(mixed)


def test_another_quantisation_is_refused(mixed):
    edit_config(mixed, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="found 'gptq'"):
        Checkpoint(mixed)


def test_folders_without_weights_or_config_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(tmp_path)
    folder = write_dense(tmp_path / "dense", "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never read"):
        Checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected JSON"):
        Checkpoint(folder)
