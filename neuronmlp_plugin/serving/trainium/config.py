"""NxDI's two config classes with our part in them.

A user's options travel as `NeuronConfig.neuronmlp`; what was decided from them and from the checkpoint as
`InferenceConfig.neuronmlp`. Both are plain JSON attributes, so that they survive NxDI's save and load and
enter the md5 by which vllm-neuron names compiled artifacts. Neither attribute exists for a model without our
block: its JSON, and so its key, is that of the base class.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

from neuronmlp_plugin.checkpoint.reader import FactorFile, read_config
from neuronmlp_plugin.checkpoint.schema import QUANT_METHOD, FormatBlock, parse_block
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.serving.trainium.options import KEY, Options, parse_options
from neuronmlp_plugin.serving.trainium.refusals import check_attention, check_supported
from nki_kernels import source_digest


class StaleArtifactError(UsageError, ValueError):
    """Compiled artifacts made from another state of the folder or other kernels. A ValueError too, on which
    vllm-neuron compiles anew.
    """


@functools.cache
def low_rank_neuron_config(base: type) -> Any:
    """A NeuronConfig subclass that keeps our options; without them, the base class in all but name."""

    class LowRankNeuronConfig(base):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            given = kwargs.pop(KEY, None)
            super().__init__(**kwargs)
            if given is not None:
                setattr(self, KEY, parse_options(given).to_json())

    return LowRankNeuronConfig


@functools.cache
def low_rank_config(base: Any) -> Any:
    """An InferenceConfig subclass that records what our block and options decide; without a block, the base
    class.
    """

    class LowRankConfig(base):
        @classmethod
        def get_neuron_config_cls(cls) -> Any:
            return low_rank_neuron_config(super().get_neuron_config_cls())

        def add_derived_config(self) -> None:
            super().add_derived_config()
            _attach_record(self)

        def validate_config(self) -> None:
            super().validate_config()
            check_attention(self, base)
            if is_low_rank(self):
                check_supported(self)

    return LowRankConfig


def options_of(config: Any) -> Options:
    """The user's options, or the defaults."""
    return Options(**getattr(config.neuron_config, KEY, {}))


def is_low_rank(config: Any) -> bool:
    """Whether the model has our block; any other is served as its base class serves it."""
    return hasattr(config, KEY)


def block_of(config: Any) -> FormatBlock | None:
    """The block that was recorded for the model, or None."""
    return (
        parse_block(getattr(config, KEY)["block"], config.__dict__, source_of(config))
        if is_low_rank(config)
        else None
    )


def source_of(config: Any) -> str:
    """Where the model came from, for messages."""
    return str(getattr(config, "_name_or_path", None) or "model config")


def _attach_record(config: Any) -> None:
    block = _find_block(config)
    if block is None:
        return
    options = options_of(config)
    record = {
        "block": block.to_json(),
        "kernels": options.kernels,
        # The compile cache does not see kernel sources; tile plans follow from them, the block and the
        # buckets, all in the key.
        "kernel_sources": source_digest(),
    }
    saved = getattr(config, KEY, None)
    if saved is not None and saved != record:
        changed = [key for key in record if saved.get(key) != record[key]]
        raise StaleArtifactError(
            f"{source_of(config)}: expected compiled artifacts of the present model and kernels, found another "
            f"{', '.join(changed)}; compile again into an empty folder."
        )
    setattr(config, KEY, record)


def _find_block(config: Any) -> FormatBlock | None:
    """From the checkpoint's own config, or from the factor file that the options name. Raises UsageError and
    CheckpointError.
    """
    embedded = getattr(config, "quantization_config", None)
    folder = pathlib.Path(source_of(config))
    if embedded and (folder / "config.json").is_file():
        # What the folder says now, which may not be what it said when the artifacts were compiled.
        embedded = read_config(folder).get("quantization_config")
    own = embedded if isinstance(embedded, dict) and embedded.get("quant_method") == QUANT_METHOD else None
    factors = options_of(config).factors
    if own and factors:
        raise UsageError(
            f"{source_of(config)}: expected a dense model under the factor file {factors}, found a factored one; drop the file."
        )
    if own:
        return parse_block(own, config.__dict__, source_of(config))
    if factors:
        return FactorFile(factors, config.__dict__).block
    if hasattr(config.neuron_config, KEY):
        raise UsageError(
            f"{source_of(config)}: expected a factored model for override_neuron_config.{KEY}, found a dense one; "
            f'name a factor file ("factors") or serve a folder that `neuronmlp compress` wrote.'
        )
    return None
