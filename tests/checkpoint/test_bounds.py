"""What a hostile or damaged folder may cost before it is refused: next to nothing, and in our own words."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import CheckpointError
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
    ],
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
    with pytest.raises(CheckpointError, match="expected a header of at most 16 MiB, found 99,614,720 bytes"):
        Checkpoint(mixed)


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
