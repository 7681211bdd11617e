"""The supported architectures. One path serves all four, since their MLPs differ in nothing but size."""

from __future__ import annotations

from typing import Any

from neuronmlp_plugin.errors import UnsupportedModelError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")


def check_supported(config: dict[str, Any], source: str) -> None:
    """Refuse, in words, every model whose MLPs are not plain `down(silu(gate(x)) * up(x))`.

    `config` is a Hugging Face config as a dict and `source` names its file. Raises UnsupportedModelError.
    """
    found = config.get("architectures") or []
    if not found or found[0] not in ARCHITECTURES:
        raise UnsupportedModelError(f"{source}: expected an architecture of {', '.join(ARCHITECTURES)}, found {found!r}.")
    if config.get("auto_map"):
        raise UnsupportedModelError(f"{source}: expected no `auto_map`, found one; remote code is never run, use a standard config.")
    if config.get("mlp_bias"):
        raise UnsupportedModelError(f"{source}: expected MLPs without bias, found mlp_bias=true; such models are not supported.")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"{source}: expected hidden_act 'silu', found {activation!r}; such models are not supported.")
