"""What a hostile or damaged folder may cost before it is refused: next to nothing, and in our own words."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.schema import INDEX_FILE
from neuronmlp_plugin.errors import LONGEST, CheckpointError
from tests.tiny_models import write_dense, write_mixed


@pytest.fixture
def mixed(tmp_path):
    return write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", "llama"))


def edit(folder, text):
    """config.json with `text` (JSON without braces) in front of its own keys' values."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = text.split('"')[1]
    config.pop(key, None)
    path.write_text("{" + text + ", " + json.dumps(config)[1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"num_hidden_layers": 20000000', "`num_hidden_layers` from 1 to 4,096, found 20000000"),
        (
            '"hidden_size": 1' + "0" * 400,
            "`hidden_size` from 1 to 262,144, found a whole number of more than 18",
        ),
        ('"intermediate_size": ' + "9" * 5000, "expected JSON, found"),
        ('"rms_norm_eps": NaN', "NaN, which is no number of JSON"),
        ('"rope_theta": 1e999', "1e999, which is too large a number"),
        ('"rms_norm_eps": -1e-6', "`rms_norm_eps` from 0 to 1, found -1e-06"),
        ('"rms_norm_eps": "small"', "`rms_norm_eps` from 0 to 1, found 'small'"),
        ('"rope_scaling": ' + "[" * 100_000 + "]" * 100_000, "expected JSON, found"),
        ('"head_dim": 1000000000', "`head_dim` from 1 to 4,096, found 1000000000"),
        ('"num_key_value_heads": 0', "`num_key_value_heads` from 1 to 4,096, found 0"),
        (
            '"max_position_embeddings": 1e15',
            "`max_position_embeddings` from 1 to 16,777,216, found 1000000000000000",
        ),
        ('"sliding_window": "x"', "`sliding_window` from 1 to 16,777,216, found 'x'"),
        ('"vocab_size": null', "expected `vocab_size`, found none"),
        ('"vocab_size": 127', r"expected shape \[127, 128\] \(from the config\), found \[128, 128\]"),
        ('"eos_token_id": []', r"expected `eos_token_id` to be a token id, or a list of some, found \[\]"),
        ('"eos_token_id": [2, 1' + "0" * 30 + "]", "expected `eos_token_id` to be a token id"),
        ('"model_type": "qwen2"', "expected `model_type` 'llama' beside LlamaForCausalLM, found 'qwen2'"),
        ('"long": "' + "x" * (9 << 20) + '"', "expected JSON of at most 8 MiB, found more"),
    ],
    ids=lambda value: value[:40],
)
def test_sizes_are_bounded_before_anything_is_made_for_each(mixed, text, message):
    edit(mixed, text)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(mixed)
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


@pytest.mark.parametrize("ratio", [10**400, -(10**400), "0.2", None, True + 1])
def test_a_ratio_beyond_all_bounds_is_a_contradiction(mixed, ratio):
    path = mixed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["removed_ratio"] = ratio
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected removed_ratio"):
        Checkpoint(mixed)


def test_a_header_that_claims_to_be_long_is_not_read(mixed):
    shard = sorted(mixed.glob("neuronmlp-*.safetensors"))[0]
    shard.write_bytes((95 << 20).to_bytes(8, "little") + b"{" * 100)
    with pytest.raises(CheckpointError, match="expected headers of at most 4 MiB, found 99,614,720 bytes"):
        Checkpoint(mixed)


def test_headers_of_a_folder_are_bounded_together(mixed):
    names = {f"zz{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(20000)}
    header = json.dumps(names).encode()
    for number in range(4):
        (mixed / f"a{number}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="expected headers of at most 4 MiB, found"):
        Checkpoint(mixed)


def test_a_count_of_shards_is_no_reason_to_look_for_each(mixed):
    shard = sorted(mixed.glob("neuronmlp-*.safetensors"))[0]
    for path in mixed.glob("neuronmlp-*.safetensors"):
        path.rename(path.with_name(path.name.replace("of-00004", "of-99999")))
    with pytest.raises(
        CheckpointError, match=r"neuronmlp-00005-of-99999\.safetensors, found no such file"
    ) as told:
        Checkpoint(shard.parent)
    assert len(str(told.value)) < 400


OUTSIDE = ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["mixed", "dense"])
def test_a_tensor_outside_the_mlps_of_another_shape_is_refused(mixed, name, kind):
    folder = mixed.with_name(kind)
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    save_file({**load_file(path), name: torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=rf"{name}: expected shape .*found \[3\]"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.second.weight"])
def test_a_dense_folder_has_no_part_that_nobody_knows_either(mixed, name):
    path = mixed.with_name("dense") / "model.safetensors"
    save_file({**load_file(path), name: torch.ones(128)}, path)
    with pytest.raises(CheckpointError, match=f"expected no tensor {name}"):
        Checkpoint(path.parent)


def test_a_tied_head_beside_factors_is_refused(mixed):
    """We would judge it, and vLLM would serve the embedding."""
    shard = sorted(mixed.glob("neuronmlp-*.safetensors"))[-1]
    save_file({**load_file(shard), "lm_head.weight": torch.ones(128, 128)}, shard)
    with pytest.raises(CheckpointError, match=r"expected no tensor lm_head\.weight"):
        Checkpoint(mixed)


def test_the_index_of_transformers_leads_nowhere_else(mixed):
    index = json.loads((mixed / INDEX_FILE).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../dense/model.safetensors")
    (mixed / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected `weight_map` to name the file of every tensor"):
        Checkpoint(mixed)


def test_weights_by_a_name_of_another_case_are_refused(mixed):
    shutil.copy(mixed.with_name("dense") / "model.safetensors", mixed / "Model.SafeTensors")
    with pytest.raises(CheckpointError, match=r"Model\.SafeTensors: expected no weight file beside"):
        Checkpoint(mixed)


def test_what_stands_in_a_file_cannot_end_the_line_that_tells_of_it(mixed):
    shard = sorted(mixed.glob("neuronmlp-*.safetensors"))[0]
    save_file({**load_file(shard), "a\n\x1b[31mneuronmlp: all is well\u202e": torch.ones(2)}, shard)
    with pytest.raises(CheckpointError) as told:
        Checkpoint(mixed)
    assert "a??[31mneuronmlp: all is well?" in str(told.value)
    assert len(str(CheckpointError("x" * 10**6))) == LONGEST


def test_tensors_of_no_part_of_the_model_are_refused(mixed):
    shard = sorted(mixed.glob("neuronmlp-*.safetensors"))[0]
    save_file({**load_file(shard), "model.layers.0.second_norm.weight": torch.ones(2)}, shard)
    with pytest.raises(CheckpointError, match=r"expected no tensor model\.layers\.0\.second_norm\.weight"):
        Checkpoint(mixed)


def test_a_file_beside_the_shards_is_refused(mixed):
    save_file({"model.norm.weight": torch.ones(128)}, mixed / "zzz.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight once, found it in"):
        Checkpoint(mixed)


@pytest.mark.parametrize("value", ['"rope_parameters": 7', '"num_attention_heads": "x"', '"head_dim": -3'])
def test_a_config_that_transformers_cannot_build_from_is_named(tmp_path, value):
    folder = write_dense(tmp_path / "dense", "llama")
    edit(folder, value)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(folder)
