"""int8 on disk: what is read is what was rounded, and every contradiction of FORMAT.md ("int8") is
refused.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE, Checkpoint
from neuronmlp_plugin.checkpoint.schema import FormatBlock, parse_block
from neuronmlp_plugin.checkpoint.writer import write_factor_file
from neuronmlp_plugin.errors import CheckpointError, NonFiniteError
from neuronmlp_plugin.models.factors import SCALE, MLPLayer, ProjectionSpec
from tests.checkpoint.test_folder import edit_config, edit_shard
from tests.tiny_models import INT8_LAYERS, MIXED_LAYERS, SHAPE, write_dense, write_mixed

CONFIG = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
BLOCK = FormatBlock(INT8_LAYERS, SHAPE, {}, "neuronmlp tests").to_json()
NAME = "model.layers.0.mlp.up_proj.u.weight"


@pytest.fixture
def folder(tmp_path):
    return write_mixed(tmp_path / "int8", write_dense(tmp_path / "dense", "llama"), layers=INT8_LAYERS)


def raw(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_every_form_is_among_the_int8_matrices_and_floating_point_beside_them():
    specs = [spec for layer in INT8_LAYERS for spec in layer.values()]
    assert {spec.form for spec in specs if spec.is_int8} == {"dense", "uv", "compact"}
    assert any(not spec.is_int8 for spec in specs)


def test_a_block_survives_its_own_json():
    parsed = parse_block(BLOCK, CONFIG, "config.json")
    assert (parsed.layers, parsed.to_json(), BLOCK["format_version"]) == (INT8_LAYERS, BLOCK, 1)


def test_int8_changes_nothing_but_the_dtype():
    block = FormatBlock(MIXED_LAYERS, SHAPE, {}, "neuronmlp tests").to_json()
    assert "dtype" not in json.dumps(block)
    assert {**block, "layers": None} == {**BLOCK, "layers": None}


def test_bytes_count_scales_and_take_floating_point_as_bf16():
    int8 = ProjectionSpec("dense", dtype="int8")
    layers = (MLPLayer(128, 192, int8, ProjectionSpec("uv", 10), ProjectionSpec("compact", 7, "int8")),)
    block = FormatBlock(layers, type(SHAPE)(128, 192, 1))
    assert block.weight_bytes == 192 * (128 + 4) + 2 * 10 * (128 + 192) + 7 * (192 - 7 + 4) + 128 * (7 + 4)
    assert block.bytes_ratio == block.weight_bytes / (2 * 3 * 128 * 192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: b["layers"][0]["up_proj"].update(dtype="int4"),
            "expected dtype 'int8' or none, found 'int4'",
        ),
    ],
)
def test_blocks_that_contradict_themselves_are_refused(change, message):
    block = copy.deepcopy(BLOCK)
    change(block)
    with pytest.raises(CheckpointError, match=message):
        parse_block(block, CONFIG, "config.json")


def test_the_model_is_exactly_that_of_the_dequantised_weights(folder):
    stored, model = raw(folder), load_model(folder)
    state = model.state_dict()
    int8 = [name for name, tensor in stored.items() if tensor.dtype is torch.int8]
    assert len(int8) == len(Checkpoint(folder).block.expected_scales()) > 6
    for name in int8:
        assert torch.equal(state[name], stored[name].float() * stored[name + SCALE][:, None])
    assert not [name for name in state if name.endswith(SCALE)]


def test_a_factor_file_holds_int8_too(folder, tmp_path):
    checkpoint, base = Checkpoint(folder), tmp_path / "dense"
    (base / FACTOR_FILE).parent.mkdir()
    write_factor_file(
        base / FACTOR_FILE, checkpoint.block, {name: t for name, t in raw(folder).items() if ".mlp." in name}
    )
    ids = torch.randint(3, 128, (2, 11))
    with torch.no_grad():
        assert torch.equal(
            load_model(base, factors=base / FACTOR_FILE)(ids).logits, load_model(folder)(ids).logits
        )


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t.pop(NAME + SCALE), CheckpointError, f"expected a tensor {NAME}_scale .*found none"),
        (
            lambda t: t.update({NAME + SCALE: torch.ones(20)}),
            CheckpointError,
            r"expected shape \[21\] .*found \[20\]",
        ),
        (lambda t: t.update({NAME: t[NAME].float()}), CheckpointError, r"expected int8 .*found F32"),
        (
            lambda t: t.update({NAME + SCALE: t[NAME + SCALE].half()}),
            CheckpointError,
            "expected fp32 .*found F16",
        ),
        (lambda t: t[NAME + SCALE].fill_(float("nan")), NonFiniteError, "finite scales of at least 0"),
        (lambda t: t[NAME + SCALE].fill_(float("inf")), NonFiniteError, "finite scales of at least 0"),
        (lambda t: t[NAME + SCALE][3:4].neg_(), NonFiniteError, "finite scales of at least 0"),
        (lambda t: t[NAME].fill_(-128), CheckpointError, "expected values from -127 to 127, found -128"),
    ],
    ids=["no scale", "length", "floating", "fp16 scale", "nan", "inf", "negative", "-128"],
)
def test_damaged_int8_is_refused(folder, edit, error, message):
    edit_shard(folder, edit)
    with pytest.raises(error, match=message):
        load_model(folder)


def test_scales_beside_a_floating_point_weight_are_refused(folder):
    edit_shard(folder, lambda t: t.update({"model.layers.0.mlp.gate_proj.u.weight_scale": torch.ones(37)}))
    with pytest.raises(CheckpointError, match="expected no tensor"):
        Checkpoint(folder)


def test_int8_weights_under_a_block_without_int8_are_refused(folder):
    edit_config(folder, quantization_config=FormatBlock(MIXED_LAYERS, SHAPE).to_json())
    with pytest.raises(CheckpointError, match="expected no tensor"):
        Checkpoint(folder)
