"""A checkpoint of any size with random weights, written shard by shard as the big ones come: for counting
bytes, not for quality.
"""

from __future__ import annotations

import json
import pathlib

import torch
from safetensors.torch import save_file

from neuronmlp_plugin.models.factors import MLPShape
from tests.letters import write_tokenizer

VOCABULARY = 128256  # of Llama 3: what its embedding and head cost is not left out
LLAMA_8B = MLPShape(hidden_size=4096, intermediate_size=14336, num_layers=32)


def write_sharded(folder: pathlib.Path, shape: MLPShape, *, vocabulary: int = VOCABULARY) -> pathlib.Path:
    """A Llama of Llama 3's proportions (heads of 128, a quarter of them for keys and values) in bf16, with a
    tokenizer.
    """
    folder.mkdir(parents=True)
    heads = shape.hidden_size // 128
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "vocab_size": vocabulary,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for shard, sizes in enumerate(_shards(shape, vocabulary)):
        name = f"model-{shard:05d}.safetensors"
        save_file(
            {key: _random(size, generator) for key, size in sizes.items()},
            folder / name,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(sizes, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def _shards(shape: MLPShape, vocabulary: int) -> list[dict[str, tuple[int, ...]]]:
    h, i = shape.hidden_size, shape.intermediate_size
    layer = {
        "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (h // 4, h),
        "self_attn.v_proj": (h // 4, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (i, h),
        "mlp.up_proj": (i, h),
        "mlp.down_proj": (h, i),
    }
    layers = [
        {f"model.layers.{n}.{name}.weight": size for name, size in layer.items()}
        for n in range(shape.num_layers)
    ]
    ends = [
        {"model.embed_tokens.weight": (vocabulary, h)},
        {"model.norm.weight": (h,), "lm_head.weight": (vocabulary, h)},
    ]
    return [ends[0], *layers, ends[1]]


def _random(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms of one, and matrices that keep the scale of what passes through them."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, generator=generator) * size[1] ** -0.5).bfloat16()
