"""Combinations with NxDI features that would compute something else than the checkpoint says, refused in
words.
"""

from __future__ import annotations

import pathlib
from typing import Any

from neuronmlp_plugin.checkpoint.schema import parse_block
from neuronmlp_plugin.errors import UnsupportedModelError, UsageError
from neuronmlp_plugin.models.families import check_supported as check_family
from neuronmlp_plugin.serving.trainium.options import KEY

# NeuronConfig attribute -> (value that is fine, why another is not, what to do instead).
_REFUSED = {
    "quantized": (
        False,
        "NxDI would quantise the factors from a dense checkpoint that has none",
        "serve the factors in bf16",
    ),
    "quantized_mlp_kernel_enabled": (False, "that kernel multiplies by dense weights", "leave it off"),
    "activation_quantization_type": (None, "it quantises the input of dense MLPs", "leave it unset"),
    "lora_config": (
        None,
        "an adapter's MLP delta applies to dense weights",
        "merge the adapter, then compress",
    ),
    "mlp_cp_degree": (1, "context-parallel MLPs come in a pair with other weights", "set mlp_cp_degree to 1"),
    "fused_rmsnorm_skip_gamma": (
        False,
        "NxDI would scale dense gate and up weights that are not there",
        "set it to false",
    ),
    "is_medusa": (False, "it is untested with low-rank MLPs", "serve without speculation"),
    "enable_fused_speculation": (
        False,
        "draft and target would share one record of factors",
        "serve without speculation",
    ),
    "is_eagle_draft": (False, "the draft model's MLP is another one", "serve without speculation"),
}


def check_supported(config: Any) -> None:
    """Refuse what NxDI would accept and get wrong. Raises UsageError or UnsupportedModelError."""
    neuron = config.neuron_config
    where = str(getattr(config, "_name_or_path", "model config"))
    check_family(config.__dict__, where)
    for name, (fine, why, instead) in _REFUSED.items():
        value = getattr(neuron, name, fine)
        if value != fine:
            raise UsageError(
                f"{where}: expected {name}={fine!r} with low-rank MLPs, found {value!r}: {why}; {instead}."
            )
    for stored in parse_block(getattr(config, KEY)["block"], config.__dict__, where).layers:
        stored.gathers(neuron.tp_degree)  # refuses a size that cannot serve the layer
    own_block = getattr(config, "quantization_config", None)
    if own_block and not pathlib.Path(where).is_dir():
        raise UsageError(
            f"{where}: expected a local folder of factors, found a hub id: vllm-neuron would load and save it through transformers, "
            "which drops every factor; download it first and serve the folder."
        )


def check_attention(config: Any, base: type) -> None:
    """Refuse a Mistral whose sliding window another family's class would ignore (families.py). Raises
    UnsupportedModelError.
    """
    window = getattr(config, "sliding_window", None)
    stands_in = getattr(config, "model_type", None) == "mistral" and "Mistral" not in base.__name__
    if stands_in and window is not None and window < config.neuron_config.seq_len:
        raise UnsupportedModelError(
            f"{getattr(config, '_name_or_path', 'model config')}: expected no sliding window below the sequence length "
            f"{config.neuron_config.seq_len}, found {window}: NxD Inference before 0.9 has no Mistral and its Llama would attend to all "
            "tokens; serve at most as many tokens as the window has."
        )
