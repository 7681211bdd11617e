"""NxDI's two config classes with our part in them.

A user's options travel as `NeuronConfig.neuronmlp`; what was decided from them and from the checkpoint as
`InferenceConfig.neuronmlp`. Both are plain JSON attributes, so that they survive NxDI's save and load and
enter the md5 by which vllm-neuron names compiled artifacts. Neither attribute exists for a model without our
block: its JSON, and so its key, is that of the base class.

An artifact read back is held against what is asked for now: against its own folder always
(StaleArtifactError), and, where vllm-neuron is loading a model, against the folder and the sizes of that
request (ArtifactError).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from neuronmlp_plugin.checkpoint.files import read_config
from neuronmlp_plugin.checkpoint.reader import FactorFile, older_rope
from neuronmlp_plugin.checkpoint.schema import QUANT_METHOD, FormatBlock, parse_block
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.serving.trainium.neuron_options import (
    KEY,
    Options,
    check_attention,
    check_placement,
    check_supported,
    parse_options,
)
from nki_kernels import source_digest

ARTIFACTS_VARIABLE = "NEURON_COMPILED_ARTIFACTS"
# NeuronConfig attribute that is compiled into an artifact -> the option of `vllm serve` that asks for it.
_COMPILED_SIZES = {
    "batch_size": "--max-num-seqs",
    "seq_len": "--max-model-len",
    "tp_degree": "--tensor-parallel-size",
    "torch_dtype": "--dtype",
}
# What two configs of one model may differ in.
_NOT_THE_MODEL = ("neuron_config", "_name_or_path", "transformers_version", "metadata", KEY)


class ArtifactError(UsageError):
    """Compiled artifacts that belong to another model, or to other sizes, than what is asked for."""


class StaleArtifactError(ArtifactError, ValueError):
    """Compiled artifacts made from another state of the folder or other kernels. A ValueError too, on which
    vllm-neuron compiles anew.
    """


@functools.cache
def low_rank_neuron_config(base: type) -> Any:
    """A NeuronConfig subclass that keeps our options; without them, the base class in all but name."""

    class LowRankNeuronConfig(base):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            # Before the base sees it: NxDI's class warns of a key that it does not know, and drops it.
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
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            """From a checkpoint (`load_config`), or from what NxDI saved beside an artifact."""
            request = _REQUEST.get()
            from_checkpoint = kwargs.get("load_config") is not None
            # Within one request the checkpoint's config comes first, an artifact's second: only that one can
            # contradict it.
            if request is not None and request.asked is not None and not from_checkpoint:
                check_artifact(request.asked, kwargs)
                if KEY in kwargs:  # the same model, wherever it lies now
                    kwargs["_name_or_path"] = source_of(request.asked)
            super().__init__(*args, **kwargs)
            if request is not None and from_checkpoint:
                request.asked = self

        @classmethod
        def get_neuron_config_cls(cls) -> Any:
            return low_rank_neuron_config(super().get_neuron_config_cls())

        def add_derived_config(self) -> None:
            super().add_derived_config()
            _attach_record(self)
            if is_low_rank(self):  # NxDI and its transformers 4 know the older spelling alone
                for name, value in older_rope(self.__dict__).items():
                    setattr(self, name, value)

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


@dataclasses.dataclass
class _Request:
    """One call of vllm-neuron's `get_neuron_model`: the config that it makes from the folder asked for,
    before it looks for artifacts.
    """

    asked: Any = None


_REQUEST: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("request", default=None)


@contextlib.contextmanager
def one_request() -> Iterator[None]:
    """While inside, a config that is read from an artifact must be of the model that was asked for."""
    token = _REQUEST.set(_Request())
    try:
        yield
    finally:
        _REQUEST.reset(token)


def checked_request(get_neuron_model: Callable[..., Any]) -> Callable[..., Any]:
    """vllm-neuron's loader function as one request, whose options stand where they are read. Idempotent."""
    if hasattr(get_neuron_model, "is_checked"):
        return get_neuron_model

    @functools.wraps(get_neuron_model)
    def check_and_get(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(get_neuron_model).bind(*args, **kwargs).arguments
        hf_config = getattr(given.get("model_config"), "hf_config", None)
        block = getattr(hf_config, "quantization_config", None)
        ours = isinstance(block, dict) and block.get("quant_method") == QUANT_METHOD
        check_placement(given.get("additional_config"), ours)
        with one_request():
            return get_neuron_model(*args, **kwargs)

    check_and_get.is_checked = True  # type: ignore[attr-defined]
    return check_and_get


def check_artifact(asked: Any, saved: dict[str, Any]) -> None:
    """Refuse an artifact, as the attributes that NxDI saved with it, that is not of the config asked for.
    Only where one of the two is low-rank. Raises ArtifactError.
    """
    wanted, record = getattr(asked, KEY, None), saved.get(KEY)
    if wanted is None and record is None:
        return
    where = f"{ARTIFACTS_VARIABLE}={os.environ.get(ARTIFACTS_VARIABLE, '')}"
    instead = f"name a folder of its own for each model and set of sizes in {ARTIFACTS_VARIABLE}."
    found = None
    if wanted is None or record is None:
        found = "that of a dense model" if record is None else "that of a low-rank model"
    elif wanted["weights"] != record.get("weights"):
        found = f"that of {saved.get('_name_or_path')}, whose weights are others"
    else:
        # By way of JSON, as `saved` came: tuples and dtypes would differ from what they are read back as.
        mine = json.loads(asked.to_json_string())
        changed = [key for key in mine if key not in _NOT_THE_MODEL and mine[key] != saved.get(key)]
        if changed:
            found = f"that of a model with another {', '.join(changed)}"
    if found:
        raise ArtifactError(
            f"{where}: expected the compiled artifact of {source_of(asked)}, found {found}; {instead}"
        )
    compiled = saved["neuron_config"]
    for name, option in _COMPILED_SIZES.items():
        want, has = getattr(asked.neuron_config, name, None), getattr(compiled, name, None)
        if want != has:
            raise ArtifactError(
                f"{where}: expected an artifact compiled for {option} {want}, found {has}; serve with {has}, "
                f"or {instead}"
            )
    given, has = getattr(asked.neuron_config, KEY, None), getattr(compiled, KEY, None)
    if given is not None and given != (has or Options().to_json()):
        raise ArtifactError(
            f"{where}: expected an artifact compiled with {KEY} {given}, found {has}; serve with that, or "
            f"{instead}"
        )


def weights_fingerprint(source: str, factors: str | None) -> str:
    """Tells models apart by content: for each weight file its size and 256 pieces of 4 KiB, evenly spread (a
    smaller file is read whole). A hub id stands for itself.
    """
    folder = pathlib.Path(source)
    files = [path for pattern in ("*.safetensors", "*.bin") for path in sorted(folder.glob(pattern))]
    digest = hashlib.sha256(b"" if files else source.encode())
    for path in [*files, *([pathlib.Path(factors)] if factors else [])]:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as handle:
            for index in range(256):
                handle.seek(index * size // 256)
                digest.update(handle.read(4096))
    return digest.hexdigest()[:16]


def _attach_record(config: Any) -> None:
    block = _find_block(config)
    if block is None:
        return
    options = options_of(config)
    saved = getattr(config, KEY, None)
    record = {
        "block": block.to_json(),
        "kernels": options.kernels,
        "weights": weights_fingerprint(source_of(config), options.factors),
        # The compile cache does not see kernel sources; tile plans follow from them, the block and the
        # buckets, all in the key.
        "kernel_sources": source_digest(),
    }
    changed = [key for key in record if saved is not None and saved.get(key) != record[key]]
    if changed:
        raise StaleArtifactError(
            f"{source_of(config)}: expected compiled artifacts of the present model and kernels, found "
            f"another {', '.join(changed)}; compile again into an empty folder."
        )
    setattr(config, KEY, {**(saved or {}), **record})


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
            f"{source_of(config)}: expected a dense model under the factor file {factors}, found a factored "
            "one; drop the file."
        )
    if own:
        return parse_block(own, config.__dict__, source_of(config))
    if factors:
        return FactorFile(factors, config.__dict__).block
    if hasattr(config.neuron_config, KEY):
        raise UsageError(
            f"{source_of(config)}: expected a factored model for override_neuron_config.{KEY}, found a dense "
            "one; "
            f'name a factor file ("factors") or serve a folder that `neuronmlp compress` wrote.'
        )
    return None
