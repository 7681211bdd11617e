"""The supported architectures. One path serves all four, since their MLPs differ in nothing but size."""

from __future__ import annotations

from typing import Any

from neuronmlp_plugin.errors import CheckpointError, UnsupportedModelError, shown

# And the `model_type` of each: transformers goes by the one, vLLM by the other.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
}


def check_supported(config: dict[str, Any], source: str) -> None:
    """Refuse, in words, every model whose MLPs are not plain `down(silu(gate(x)) * up(x))`.

    `config` is a Hugging Face config as a dict and `source` names its file. Raises UnsupportedModelError, and
    CheckpointError for values that contradict each other or can be none.
    """
    found = config.get("architectures")
    if not isinstance(found, list) or not found or found[0] not in [*ARCHITECTURES]:
        raise UnsupportedModelError(
            f"{source}: expected an architecture of {', '.join(ARCHITECTURES)}, found {shown(found)}."
        )
    kind = ARCHITECTURES[found[0]]
    if config.get("model_type", kind) != kind:
        raise CheckpointError(
            f"{source}: expected `model_type` {kind!r} beside {found[0]}, found "
            f"{shown(config['model_type'])}; engines would build different models of it."
        )
    if config.get("auto_map"):
        raise UnsupportedModelError(
            f"{source}: expected no `auto_map`, found one; remote code is never run, use a standard config."
        )
    if config.get("mlp_bias"):
        raise UnsupportedModelError(
            f"{source}: expected MLPs without bias, found mlp_bias=true; such models are not supported."
        )
    _check_numbers(config, source)
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(
            f"{source}: expected hidden_act 'silu', found {shown(activation)}; such models are not supported."
        )


def _check_numbers(config: dict[str, Any], source: str) -> None:
    """Those that end a run late, or make NaN of anything. Raises CheckpointError."""
    epsilon = config.get("rms_norm_eps", 1e-6)
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise CheckpointError(
            f"{source}: expected `rms_norm_eps` from 0 to 1, found {shown(epsilon)}; the config is not "
            "usable."
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = config.get(key)
        if not all(_is_id(each) for each in (ids if isinstance(ids, list) and ids else [ids])):
            raise CheckpointError(
                f"{source}: expected `{key}` to be a token id, or a list of some, found {shown(ids)}; the "
                "config is not usable."
            )


def _is_id(value: Any) -> bool:
    """None, or a number that engines have room for; some configs say -1 for none."""
    return value is None or (type(value) is int and -1 <= value < 1 << 31)


def is_outside_mlps(name: str) -> bool:
    """Whether a stored tensor is no part of an MLP. Old exports store rotary tables too: they are recomputed,
    and count as nothing.
    """
    return ".mlp." not in name and not name.endswith("rotary_emb.inv_freq")


def shapes_outside_mlps(config: dict[str, Any], num_layers: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor beside the MLPs that a model of a supported architecture has; a tied head
    is none. `config` has sizes that `checkpoint.schema.mlp_shape` found to be numbers.
    """
    family, hidden = config["architectures"][0], config["hidden_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    rows = {"q": queries, "k": keys, "v": keys, "o": hidden}
    in_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        **{f"self_attn.{p}_proj.weight": (rows[p], queries if p == "o" else hidden) for p in rows},
    }
    biases = "qkv" if family == "Qwen2ForCausalLM" else ""
    if family == "Qwen3ForCausalLM":
        in_layer |= {f"self_attn.{p}_norm.weight": (head_dim,) for p in "qk"}
    # The other two families never look at it: Qwen2 always has these biases (but o's), Mistral never.
    if config.get("attention_bias") and family in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        biases = "qkvo"
    in_layer |= {f"self_attn.{p}_proj.bias": (rows[p],) for p in biases}
    table = (config["vocab_size"], hidden)
    shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = table
    return shapes | {
        f"model.layers.{index}.{name}": size for index in range(num_layers) for name, size in in_layer.items()
    }
