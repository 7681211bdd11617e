"""Our part of NxDI's configs: it survives the round trip, enters the key, is absent for other models, and
refuses what would be wrong.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import types

import pytest

from neuronmlp_plugin.checkpoint.files import read_config
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.writer import write_factor_file
from neuronmlp_plugin.errors import UnsupportedModelError, UsageError
from neuronmlp_plugin.serving.trainium import config as config_module
from neuronmlp_plugin.serving.trainium.config import (
    ArtifactError,
    StaleArtifactError,
    block_of,
    checked_request,
    low_rank_config,
    one_request,
)
from tests.serving.trainium.stand_ins import InferenceConfig, load_values
from tests.tiny_models import MIXED_LAYERS, write_dense, write_mixed

LowRank = low_rank_config(InferenceConfig)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("config")
    dense = write_dense(root / "dense", "llama")
    return {"dense": dense, "mixed": write_mixed(root / "mixed", dense)}


def make(folder, base=LowRank, hf=None, **neuron):
    values = {**read_config(folder), "_name_or_path": str(folder), **(hf or {})}
    return base(base.get_neuron_config_cls()(**neuron), load_config=load_values(values))


def test_a_dense_model_keeps_the_key_of_the_stock_class(folders):
    assert make(folders["dense"]).to_json_string() == make(folders["dense"], InferenceConfig).to_json_string()
    assert block_of(make(folders["dense"])) is None


def test_the_stock_class_would_have_dropped_our_options(folders):
    assert make(folders["dense"], InferenceConfig, neuronmlp={}).neuron_config.unknown == ["neuronmlp"]
    assert make(folders["mixed"], neuronmlp={}).neuron_config.unknown == []


def test_block_and_options_survive_the_round_trip(folders):
    config = make(folders["mixed"], tp_degree=2, neuronmlp={"kernels": "off"})
    again = LowRank.from_json_string(config.to_json_string())
    assert again.to_json_string() == config.to_json_string()
    assert block_of(again).layers == MIXED_LAYERS
    assert again.neuronmlp["kernels"] == "off"


def other_rank(folders, tmp_path):
    """A folder whose config says another rank of one matrix."""
    gate = dataclasses.replace(MIXED_LAYERS[0]["gate_proj"], rank=38)
    block = dataclasses.replace(
        Checkpoint(folders["mixed"]).block,
        layers=(MIXED_LAYERS[0].with_specs({"gate_proj": gate}), *MIXED_LAYERS[1:]),
    )
    (tmp_path / "config.json").write_text(
        json.dumps({**read_config(folders["mixed"]), "quantization_config": block.to_json()})
    )
    return tmp_path


def test_rank_kernels_and_kernel_sources_change_the_key(folders, tmp_path, monkeypatch):
    def key(*args, **kwargs):
        return json.dumps(make(*args, **kwargs).neuronmlp)

    keys = {key(folders["mixed"]), key(folders["mixed"], neuronmlp={"kernels": "off"})}
    keys.add(key(other_rank(folders, tmp_path)))
    monkeypatch.setattr(config_module, "source_digest", lambda: "another kernel")
    keys.add(key(folders["mixed"]))
    assert len(keys) == 4
    assert (
        json.loads(make(folders["mixed"]).to_json_string())["neuronmlp"] == make(folders["mixed"]).neuronmlp
    )


def test_artifacts_of_another_state_of_the_folder_are_not_loaded(folders, tmp_path):
    folder = other_rank(folders, tmp_path)
    saved = make(folder).to_json_string()
    LowRank.from_json_string(saved)
    (folder / "config.json").write_text((folders["mixed"] / "config.json").read_text())
    with pytest.raises(StaleArtifactError, match="another block; compile again"):
        LowRank.from_json_string(saved)


def test_artifacts_of_other_kernels_are_not_loaded(folders, monkeypatch):
    saved = make(folders["mixed"]).to_json_string()
    monkeypatch.setattr(config_module, "source_digest", lambda: "another kernel")
    with pytest.raises(StaleArtifactError, match="another kernel_sources; compile again"):
        LowRank.from_json_string(saved)
    assert issubclass(StaleArtifactError, ValueError)  # on which vllm-neuron compiles anew


@pytest.fixture(scope="module")
def other(folders, tmp_path_factory):
    """Another model of the same shapes and ranks: as a fine-tuned sibling, compressed alike."""
    return write_mixed(tmp_path_factory.mktemp("other") / "mixed", folders["dense"], seed=5)


def read_back(asked, artifact_of, **neuron):
    """What happens when vllm-neuron is asked for one folder and finds the artifact of another."""
    saved = make(artifact_of, **neuron).to_json_string()
    with one_request():
        make(asked)
        return LowRank.from_json_string(saved)


def test_an_artifact_of_another_model_is_refused_in_words(folders, other, monkeypatch):
    monkeypatch.setenv("NEURON_COMPILED_ARTIFACTS", "/artifacts/a")
    read_back(folders["mixed"], folders["mixed"])
    with pytest.raises(
        ArtifactError, match=r"/artifacts/a: expected .* of .*, found that of .* weights are others"
    ):
        read_back(other, folders["mixed"])
    with pytest.raises(ArtifactError, match="found that of a low-rank model"):
        read_back(folders["dense"], folders["mixed"])
    with pytest.raises(ArtifactError, match="found that of a dense model"):
        read_back(folders["mixed"], folders["dense"])
    read_back(folders["dense"], folders["dense"])
    assert not issubclass(ArtifactError, ValueError)  # or vllm-neuron would compile over the other's artifact


def test_an_artifact_with_other_values_of_the_architecture_is_refused(folders, tmp_path):
    shutil.copytree(folders["mixed"], tmp_path / "scaled")
    config = {**read_config(folders["mixed"]), "rms_norm_eps": 0.5}
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="another rms_norm_eps"):
        read_back(tmp_path / "scaled", folders["mixed"])


def test_a_model_that_was_moved_keeps_its_artifact(folders, tmp_path):
    shutil.copytree(folders["mixed"], tmp_path / "moved")
    config = read_back(tmp_path / "moved", folders["mixed"])
    assert config._name_or_path == str(tmp_path / "moved")  # the weights are read from there, too


@pytest.mark.parametrize(
    ("compiled", "option"),
    [
        ({"batch_size": 4}, "--max-num-seqs 1, found 4"),
        ({"seq_len": 64}, "--max-model-len 128, found 64"),
        ({"tp_degree": 2}, "--tensor-parallel-size 1, found 2"),
        ({"torch_dtype": "float32"}, "--dtype torch.bfloat16, found torch.float32"),
    ],
)
def test_an_artifact_of_other_sizes_is_refused(folders, compiled, option):
    with pytest.raises(ArtifactError, match=f"compiled for {option}"):
        read_back(folders["mixed"], folders["mixed"], **compiled)


def test_options_that_an_artifact_was_not_compiled_with_are_refused_and_none_are_taken(folders):
    saved = make(folders["mixed"], neuronmlp={"kernels": "off"}).to_json_string()
    with one_request():
        make(folders["mixed"])  # nothing said: what was compiled stays in force
        assert LowRank.from_json_string(saved).neuronmlp["kernels"] == "off"
    with one_request(), pytest.raises(ArtifactError, match="compiled with neuronmlp"):
        make(folders["mixed"], neuronmlp={"kernels": "auto"})
        LowRank.from_json_string(saved)


def test_outside_a_request_an_artifact_is_held_against_its_own_folder_alone(folders, other):
    saved = make(folders["mixed"]).to_json_string()
    make(other)
    assert LowRank.from_json_string(saved).neuronmlp == make(folders["mixed"]).neuronmlp


def loader(model_config, additional_config=None):
    return additional_config


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        (
            {"neuronmlp": {"kernels": "off"}},
            "expected 'neuronmlp' inside 'override_neuron_config', found it beside",
        ),
        ({"override-neuron-config": {"neuronmlp": {}}}, "found 'override-neuron-config'.*write underscores"),
    ],
)
def test_options_where_vllm_neuron_does_not_read_them_are_refused(additional, message):
    model = types.SimpleNamespace(hf_config=types.SimpleNamespace())
    with pytest.raises(UsageError, match=message):
        checked_request(loader)(model, additional_config=additional)
    stock = {"override-neuron-config": {"enable_bucketing": True}}
    assert (
        checked_request(loader)(model, additional_config=stock) == stock
    )  # of a dense model: not our business
    ours = types.SimpleNamespace(quantization_config={"quant_method": "neuronmlp"})
    with pytest.raises(UsageError, match="write underscores"):
        checked_request(loader)(types.SimpleNamespace(hf_config=ours), stock)


def test_a_checked_loader_is_checked_once():
    assert checked_request(checked_request(loader)) is not loader
    once = checked_request(loader)
    assert checked_request(once) is once


def test_a_factor_file_makes_a_dense_model_low_rank(folders, tmp_path):
    mixed = Checkpoint(folders["mixed"])
    names = mixed.block.expected_tensors(only_changed=True)
    write_factor_file(
        tmp_path / "factors.safetensors", mixed.block, {name: mixed.tensor(name) for name in names}
    )
    options = {"factors": str(tmp_path / "factors.safetensors")}
    assert block_of(make(folders["dense"], neuronmlp=options)).layers == MIXED_LAYERS
    with pytest.raises(UsageError, match="drop the file"):
        make(folders["mixed"], neuronmlp=options)


def test_a_dense_folder_of_transformers_5_keeps_its_rope_under_transformers_4(folders, tmp_path):
    """Transformers 4 fills in a theta of 10000 and keeps `rope_parameters` as a value that nobody reads."""
    mixed = Checkpoint(folders["mixed"])
    names = mixed.block.expected_tensors(only_changed=True)
    factors = tmp_path / "factors.safetensors"
    write_factor_file(factors, mixed.block, {name: mixed.tensor(name) for name in names})
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    read_by_4 = {"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": rope}
    config = make(folders["dense"], hf=read_by_4, neuronmlp={"factors": str(factors)})
    assert config.rope_theta == 5e5 and config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert make(folders["dense"], hf=read_by_4).rope_theta == 1e4  # a model of others is theirs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantized", True),
        ("quantized_mlp_kernel_enabled", True),
        ("activation_quantization_type", "dynamic"),
        ("lora_config", {"max_loras": 1}),
        ("mlp_cp_degree", 2),
        ("fused_rmsnorm_skip_gamma", True),
        ("is_medusa", True),
        ("enable_fused_speculation", True),
        ("is_eagle_draft", True),
    ],
)
def test_what_nxdi_would_get_wrong_is_refused(folders, name, value):
    class Neuron(LowRank.get_neuron_config_cls()):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            setattr(self, name, value)

    values = {**read_config(folders["mixed"]), "_name_or_path": str(folders["mixed"])}
    with pytest.raises(UsageError, match=f"expected {name}="):
        LowRank(Neuron(), load_config=load_values(values))
    del values["quantization_config"]
    LowRank(Neuron(), load_config=load_values(values))  # a dense model is none of our business


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "keys of kernels, factors"),
        ("gather", "expected an object"),
        ({"tp_scheme": "reduce"}, "keys of kernels, factors"),
        ({"kernels": "on"}, "one of auto, off, require"),
    ],
)
def test_options_that_mean_nothing_are_refused(folders, options, message):
    with pytest.raises(UsageError, match=message):
        make(folders["mixed"], neuronmlp=options)


def test_options_for_a_dense_model_are_refused(folders):
    with pytest.raises(UsageError, match="found a dense one"):
        make(folders["dense"], neuronmlp={"kernels": "off"})


def test_a_hub_id_of_factors_is_refused(folders):
    with pytest.raises(UsageError, match="found a hub id"):
        make(folders["mixed"], hf={"_name_or_path": "someone/compressed-llama"})


def test_tp_that_does_not_divide_the_channels_is_refused(folders):
    with pytest.raises(
        UsageError, match=r"expected a size that serves this MLP .*any divisor of its 192 channels"
    ):
        make(folders["mixed"], tp_degree=5)


def test_an_mlp_with_bias_is_refused(folders):
    with pytest.raises(UnsupportedModelError, match="bias"):
        make(folders["mixed"], hf={"mlp_bias": True})


def test_a_sliding_window_that_a_stand_in_would_ignore_is_refused(folders):
    mistral = {"model_type": "mistral", "sliding_window": 100}
    make(folders["dense"], hf=mistral, seq_len=100)
    with pytest.raises(UnsupportedModelError, match=r"found 100: NxD Inference before 0\.9"):
        make(folders["dense"], hf=mistral, seq_len=128)
    MistralConfig = type("MistralInferenceConfig", (InferenceConfig,), {})
    make(folders["dense"], low_rank_config(MistralConfig), hf=mistral, seq_len=128)
