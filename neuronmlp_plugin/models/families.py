"""The supported architectures. One path serves all four, since their MLPs differ in nothing but size."""

from __future__ import annotations

from typing import Any

from neuronmlp_plugin.errors import CheckpointError, UnsupportedModelError, shown

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")


def check_supported(config: dict[str, Any], source: str) -> None:
    """Refuse, in words, every model whose MLPs are not plain `down(silu(gate(x)) * up(x))`.

    `config` is a Hugging Face config as a dict and `source` names its file. Raises UnsupportedModelError, and
    CheckpointError for an epsilon of the norms that makes NaN of anything.
    """
    found = config.get("architectures")
    if not isinstance(found, list) or not found or found[0] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{source}: expected an architecture of {', '.join(ARCHITECTURES)}, found {shown(found)}."
        )
    if config.get("auto_map"):
        raise UnsupportedModelError(
            f"{source}: expected no `auto_map`, found one; remote code is never run, use a standard config."
        )
    if config.get("mlp_bias"):
        raise UnsupportedModelError(
            f"{source}: expected MLPs without bias, found mlp_bias=true; such models are not supported."
        )
    epsilon = config.get("rms_norm_eps", 1e-6)
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise CheckpointError(
            f"{source}: expected `rms_norm_eps` from 0 to 1, found {shown(epsilon)}; the config is not "
            "usable."
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(
            f"{source}: expected hidden_act 'silu', found {shown(activation)}; such models are not supported."
        )


def names_outside_mlps(config: dict[str, Any], num_layers: int) -> list[str]:
    """Every tensor beside the MLPs without which a model of a supported architecture cannot run (a tied head
    may be left out).
    """
    family = config["architectures"][0]
    in_layer = [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
    ]
    if family == "Qwen2ForCausalLM":
        in_layer += [f"self_attn.{p}_proj.bias" for p in "qkv"]
    elif family == "Qwen3ForCausalLM":
        in_layer += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    # The other two families never look at it: Qwen2 always has these biases (but o's), Mistral never.
    if config.get("attention_bias") and family in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        in_layer += [f"self_attn.{p}_proj.bias" for p in "qkvo"]
    head = [] if config.get("tie_word_embeddings") else ["lm_head.weight"]
    names = ["model.embed_tokens.weight", "model.norm.weight", *head]
    return names + [f"model.layers.{index}.{name}" for index in range(num_layers) for name in in_layer]
