"""What a user may ask for, and what is refused: our own options and where they may stand, and the features of
NxDI that would compute something else than the checkpoint says.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from neuronmlp_plugin.checkpoint.schema import parse_block
from neuronmlp_plugin.errors import UnsupportedModelError, UsageError
from neuronmlp_plugin.models.families import check_supported as check_family

KEY = "neuronmlp"
OVERRIDE = "override_neuron_config"  # the one key of vLLM's additional_config that vllm-neuron hands to NxDI
KERNELS = ("auto", "off", "require", "prefill", "decode")

# NeuronConfig attribute -> (value that is fine, why another is not, what to do instead).
_REFUSED = {
    "quantized": (
        False,
        "NxDI would quantise dense MLPs that are not there",
        "leave it off: what `neuronmlp quantize` made int8 stays int8 without it",
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


@dataclasses.dataclass(frozen=True)
class Options:
    """`--additional-config '{"override_neuron_config": {"neuronmlp": {...}}}'`, every field of it optional.

    kernels: `auto` uses the NKI kernels where they apply and the vendor's compiler takes them, `off` never
        does, `require` refuses to compile a layer without them; `prefill` and `decode` use them in that phase
        alone, and keep two copies of the weights, since the other phase needs another layout.
    factors: a factor file (FORMAT.md) to lay over a dense model; a factored folder needs none.
    """

    kernels: str = "auto"
    factors: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def parse_options(given: Any) -> Options:
    """Check the user's words; raises UsageError."""
    names = [field.name for field in dataclasses.fields(Options)]
    if not isinstance(given, dict) or not set(given) <= set(names):
        raise UsageError(
            f"{OVERRIDE}.{KEY}: expected an object with keys of {', '.join(names)}, found {given!r}."
        )
    options = Options(**given)
    if options.kernels not in KERNELS:
        raise UsageError(
            f"{OVERRIDE}.{KEY}.kernels: expected one of {', '.join(KERNELS)}, found {options.kernels!r}."
        )
    return options


def check_placement(additional_config: Any, low_rank: bool) -> None:
    """Refuse options that vllm-neuron would not read: ours beside `override_neuron_config`, and that name
    with hyphens, as the vendor's guide prints it (for a low-rank model, or with our key in it). Raises
    UsageError.
    """
    given = additional_config if isinstance(additional_config, dict) else {}
    if KEY in given:
        raise UsageError(
            f"additional_config: expected {KEY!r} inside {OVERRIDE!r}, found it beside; "
            f'write {{"{OVERRIDE}": {{"{KEY}": ...}}}}.'
        )
    for name, value in given.items():
        misspelt = name != OVERRIDE and name.replace("-", "_") == OVERRIDE
        if misspelt and (low_rank or (isinstance(value, dict) and KEY in value)):
            raise UsageError(
                f"additional_config: expected the key {OVERRIDE!r}, found {name!r}, which vllm-neuron does "
                "not read; write underscores."
            )


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
            f"{where}: expected a local folder of factors, found a hub id: vllm-neuron would load and save "
            "it through transformers, which drops every factor; download it first and serve the folder."
        )


def check_attention(config: Any, base: type) -> None:
    """Refuse a Mistral whose sliding window another family's class would ignore. Raises
    UnsupportedModelError.
    """
    window = getattr(config, "sliding_window", None)
    stands_in = getattr(config, "model_type", None) == "mistral" and "Mistral" not in base.__name__
    if stands_in and window is not None and window < config.neuron_config.seq_len:
        raise UnsupportedModelError(
            f"{getattr(config, '_name_or_path', 'model config')}: expected no sliding window below the "
            "sequence "
            f"length {config.neuron_config.seq_len}, found {window}: NxD Inference before 0.9 has no Mistral "
            "and its Llama would attend to all tokens; serve at most as many tokens as the window has."
        )
