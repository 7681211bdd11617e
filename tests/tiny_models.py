"""Tiny random models of every family, written as Hugging Face folders: for wiring, not for quality.

Weights are drawn wide (std 0.08 and more), so that logits depend on the MLPs; still, tests compare logits,
not tokens.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import torch
from safetensors.torch import save_file

from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.checkpoint.writer import layer_prefix, write_layer, write_rest
from neuronmlp_plugin.models.definition import build_linear, quantize
from neuronmlp_plugin.models.factors import INT8, SCALE, MLPLayer, MLPShape, ProjectionSpec

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
SHAPE = MLPShape(hidden_size=128, intermediate_size=192, num_layers=3)
# Every form for every projection, and ranks that 2 does not divide.
MIXED_LAYERS = tuple(
    MLPLayer(SHAPE.hidden_size, SHAPE.intermediate_size, *(ProjectionSpec(*spec) for spec in specs))
    for specs in (
        (("compact", 37), ("uv", 21), ("dense",)),
        (("dense",), ("compact", 32), ("compact", 45)),
        (("uv", 30), ("dense",), ("uv", 33)),
    )
)
# The same with int8 in every form, beside floating-point matrices of the same layer.
INT8_LAYERS = tuple(
    layer.with_specs(
        {
            name: dataclasses.replace(spec, dtype=INT8 if (index + i) % 3 else None)
            for i, (name, spec) in enumerate(layer.items())
        }
    )
    for index, layer in enumerate(MIXED_LAYERS)
)


def grouped_layers(groups: int, int8: bool = False) -> tuple[MLPLayer, ...]:
    """Layers of so many groups, two of them narrow: every low-rank form, and one that is dense throughout."""
    made = []
    for index, (channels, specs) in enumerate(
        (
            (192, (("compact", 11), ("uv", 9), ("compact", 13))),
            (128, (("dense",), ("compact", 7), ("uv", 9))),
            (64, (("dense",), ("dense",), ("dense",))),
        )
    ):
        given = [ProjectionSpec(*spec) for spec in specs]
        if int8:
            given = [
                dataclasses.replace(s, dtype=INT8 if (index + i) % 3 else None) for i, s in enumerate(given)
            ]
        made.append(MLPLayer(SHAPE.hidden_size, channels, *given, groups=groups))
    return tuple(made)


def family_config(family: str, vocab_size: int = 128) -> dict:
    """A config whose heads can be halved (tensor parallel 2), of the smallest size that the CPU attention of
    vLLM takes.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        family,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=vocab_size,
        max_position_embeddings=256,
        tie_word_embeddings=family in ("llama", "qwen3"),
        bos_token_id=1,
        eos_token_id=2,
        sliding_window=None,
    )
    architecture = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[family]
    return {
        **config.to_dict(),
        "architectures": [f"{architecture}ForCausalLM"],
        "torch_dtype": "float32",
        "dtype": "float32",
    }


def write_dense(
    folder: pathlib.Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> pathlib.Path:
    """A dense folder with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = family_config(family)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tied = config["tie_word_embeddings"]
    state = {
        n: _wide(n, p).to(dtype)
        for n, p in model.state_dict().items()
        if not (tied and n == "lm_head.weight")
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _wide(name: str, parameter: torch.Tensor) -> torch.Tensor:
    if "norm" in name:
        return torch.rand_like(parameter) + 0.5
    return torch.randn_like(parameter) * (0.3 if "mlp" in name else 0.08)


def write_mixed(
    folder: pathlib.Path,
    base_folder: pathlib.Path,
    *,
    seed: int = 1,
    layers: tuple[MLPLayer, ...] = MIXED_LAYERS,
) -> pathlib.Path:
    """A factored folder over `base_folder` with these layers; the factors are random, small enough to keep
    activations sane.
    """
    folder.mkdir(parents=True)
    base = Checkpoint(base_folder)
    block = FormatBlock(layers, SHAPE, {}, "neuronmlp tests")
    torch.manual_seed(seed)
    for index, layer in enumerate(layers):
        write_layer(folder, base, index, _random_factors(index, layer))
    write_rest(folder, base, block)
    return folder


def _random_factors(index: int, layer: MLPLayer) -> dict[str, torch.Tensor]:
    factors = {}
    for projection, matrix in layer.matrices.items():
        for suffix, weight in build_linear(matrix).state_dict().items():
            name, drawn = f"{layer_prefix(index)}mlp.{projection}.{suffix}", torch.randn_like(weight) * 0.2
            if matrix.spec.is_int8:
                factors[name], factors[name + SCALE] = quantize(drawn)
            else:
                factors[name] = drawn
    return factors
