"""What a user of a CPU would serve instead of a compressed folder: the dense model in int8, weights and
activations (compressed-tensors, vLLM's own), or the Q8_0 of llama.cpp. Both are made from the same dense
folder.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import torch
from safetensors.torch import save_file

from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.models.definition import quantize

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def write_w8a8(dense: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A compressed-tensors folder: int8 weights with a scale for each channel, activations rounded as they
    come.
    """
    checkpoint, tensors = Checkpoint(dense), {}
    for name, tensor in checkpoint.tensors():
        if name.split(".")[-2] in _PROJECTIONS and name.endswith(".weight"):
            q, scale = quantize(tensor)
            tensors[name], tensors[name + "_scale"] = q, scale[:, None].to(torch.bfloat16)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {**checkpoint.config, "quantization_config": _W8A8, "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for path in dense.glob("tokenizer*.json"):
        shutil.copy(path, out)
    return out


def write_q8_0(dense: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A .gguf file of a Llama without its vocabulary, which a benchmark does not need. Raises UsageError for
    another architecture, or without the package `gguf`.
    """
    try:
        import gguf  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise UsageError("--gguf: expected the package gguf, found none; pip install gguf.") from error
    checkpoint = Checkpoint(dense)
    config = checkpoint.config
    if config["model_type"] != "llama":
        raise UsageError(
            f"{dense}: expected a Llama for llama.cpp, found model_type {config['model_type']!r}."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, "llama")
    _describe(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in checkpoint.tensors():
        values = tensor.float()
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if projection in name:  # llama.cpp rotates neighbours, Hugging Face halves
                parts = values.reshape(config[heads], 2, -1, values.shape[1])
                values = parts.transpose(1, 2).reshape(values.shape)
        data, kind = values.contiguous().numpy(), gguf.GGMLQuantizationType.F32
        if data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(data, kind)
        told = names.get_name(name, try_suffixes=(".weight",))
        assert told is not None, f"{name}: llama.cpp has no such tensor"
        writer.add_tensor(told, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _describe(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_rope_dimension_count(
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
