"""Read a folder of safetensors, dense or factored, and refuse everything that FORMAT.md refuses."""

from __future__ import annotations

import pathlib
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch

from neuronmlp_plugin.checkpoint.files import (
    Headers,
    index_tensors,
    open_safetensors,
    parse_object,
    read_config,
    read_headers,
    read_object,
    safetensors_in,
    weight_files,
)
from neuronmlp_plugin.checkpoint.schema import (
    INDEX_FILE,
    QUANT_METHOD,
    FormatBlock,
    base_layers,
    mlp_shape,
    parse_block,
)
from neuronmlp_plugin.errors import CheckpointError, NonFiniteError, shown
from neuronmlp_plugin.models.definition import LIMIT, Weight
from neuronmlp_plugin.models.factors import SCALE
from neuronmlp_plugin.models.families import check_supported, is_outside_mlps, shapes_outside_mlps

# In a folder of its own: engines load every *.safetensors file that lies beside config.json.
FACTOR_FILE = pathlib.Path("neuronmlp", "factors.safetensors")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FLOATS = ("BF16", "F16", "F32")  # the same, as safetensors spells them
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Of tensors that GPTQ, AWQ, bitsandbytes and compressed-tensors store; the config need not say so.
_QUANTISED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB")


class Checkpoint:
    """An opened model folder: its config, its block (None for a dense model) and its tensors by name.

    An int8 weight is one tensor here, whose scales are not seen: it is dequantised when it is read (`weight`
    gives both as they are). Opening reads only headers. Raises CheckpointError, FormatVersionError or
    UnsupportedModelError.
    """

    def __init__(self, folder: str | pathlib.Path) -> None:
        self.folder = pathlib.Path(folder)
        self.config = read_config(self.folder)
        check_supported(self.config, str(self.folder / "config.json"))
        block = self.config.get("quantization_config")
        self.block = self._parse(block) if block is not None else None
        self._files = index_tensors(weight_files(self.folder))
        self._scales = self.block.expected_scales() if self.block is not None else {}
        # Of two names for one tensor `safetensors.torch.save_model` keeps the first in the alphabet.
        if self.config.get("tie_word_embeddings") and _HEAD in self._files:
            self._files.setdefault(_EMBEDDING, self._files[_HEAD])
        # Of a folder with a block our writer has settled that.
        if self.block is None and self._has_its_own_head():
            self.config["tie_word_embeddings"] = False
        _check_outside(self.config, self._files, str(self.folder), self.block is None)
        if self.block is not None:
            check_all_read(self)
            _check_headers(self.block, self._files, str(self.folder))
            _check_index(self)

    def _parse(self, block: Any) -> FormatBlock:
        where = str(self.folder / "config.json")
        found = block.get("quant_method") if isinstance(block, dict) else block
        if found != QUANT_METHOD or not isinstance(block, dict):
            raise CheckpointError(
                f"{where}: expected no quantization_config, or quant_method {QUANT_METHOD!r}, found "
                f"{shown(found)}; compress the unquantised model."
            )
        return parse_block(block, self.config, where)

    def _has_its_own_head(self) -> bool:
        """Whether a head is stored that the config calls tied and that differs from the embedding.

        transformers keeps such a head and vLLM drops it; a config that says so lets every engine keep it.
        """
        if not self.config.get("tie_word_embeddings") or _HEAD not in self._files:
            return False
        return not torch.equal(self.tensor(_HEAD), self.tensor(_EMBEDDING))

    @property
    def files(self) -> list[pathlib.Path]:
        """The files of weights that are read."""
        return sorted({header.path for header in self._files.values()})

    def places(self) -> dict[str, str]:
        """Name -> file of every tensor as it is stored, scales among them."""
        return {name: header.path.name for name, header in self._files.items()}

    def names(self) -> list[str]:
        return sorted(name for name in self._files if name not in self._scales)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        return {name: self._files[name].shape for name in self.names()}

    def dtypes(self) -> dict[str, str]:
        """Name -> dtype as stored, in the spelling of safetensors, of every tensor."""
        return {name: self._files[name].dtype for name in self.names()}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, finite and in a floating dtype (fp32 where int8 is stored)."""
        return self.weight(name).expanded()

    def weight(self, name: str) -> Weight:
        """One tensor as it is stored, checked: with its scales where it is int8."""
        if name not in self._files:
            raise CheckpointError(
                f"{self.folder}: expected a tensor {name}, found none; the folder is incomplete."
            )
        return read_weight(name, self._files, self._scales)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.names():
            yield name, self.tensor(name)


class FactorFile:
    """An opened factor file (FORMAT.md): its block and its MLP tensors, to be laid over `config`'s dense
    model.
    """

    def __init__(self, path: str | pathlib.Path, config: dict[str, Any]) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise CheckpointError(
                f"{self.path}: expected a factor file, found none; write one with `neuronmlp compress "
                "--factors-only`."
            )
        with open_safetensors(self.path) as handle:
            text = (handle.metadata() or {}).get(QUANT_METHOD)
        if text is None:
            raise CheckpointError(
                f"{self.path}: expected `{QUANT_METHOD}` metadata in the safetensors header, found none."
            )
        self.block = parse_block(parse_object(text, self.path), config, str(self.path))
        self._files = read_headers(self.path)
        _check_headers(self.block, self._files, str(self.path), only_changed=True)
        expected = self.block.expected_tensors(only_changed=True)
        self.prefixes = sorted({name.partition(".mlp.")[0] + ".mlp." for name in expected})

    def tensor(self, name: str) -> torch.Tensor:
        """One weight, dequantised to fp32 where it is stored as int8."""
        return self.weight(name).expanded()

    def weight(self, name: str) -> Weight:
        """One weight as it is stored, checked: with its scales where it is int8."""
        return read_weight(name, self._files, self.block.expected_scales())

    def stored(self, name: str) -> torch.Tensor:
        """One tensor as it is stored, int8 weights and their scales included."""
        return _stored(name, self._files)


def open_dense(folder: str | pathlib.Path) -> Checkpoint:
    """A folder that is to be the measure of others: a factored one is refused."""
    checkpoint = Checkpoint(folder)
    if checkpoint.block is not None:
        raise CheckpointError(
            f"{folder}: expected the dense model, found a factored one; name the folder that it was made "
            "from."
        )
    return checkpoint


def dense_block(base: Checkpoint) -> FormatBlock:
    """The block that a dense folder goes without: every matrix is its own. Raises CheckpointError where one
    is missing or misshapen.
    """
    shape = mlp_shape(base.config, str(base.folder / "config.json"))
    block = FormatBlock(base_layers(shape), shape)
    check_names(block.expected_tensors(), base.shapes(), str(base.folder))
    return block


def older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, as transformers 4 spells them, of a config that has transformers 5's
    `rope_parameters`; nothing of any other. Transformers 4 would read 10000 and no scaling instead.

    Where a config has a `rope_scaling` too, transformers 5 goes by that and by `rope_theta`.
    """
    rope = {} if config.get("rope_scaling") else config.get("rope_parameters") or {}
    older = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return older


def checked_tensor(tensor: torch.Tensor, name: str, path: pathlib.Path) -> torch.Tensor:
    """Refuse integers and quantised types (CheckpointError), NaN and Inf (NonFiniteError)."""
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(
            f"{path}: {name}: expected bf16, fp16 or fp32, found {tensor.dtype}; save the model in one of "
            "them."
        )
    if not is_finite(tensor):
        # Only now: the count costs a copy.
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{path}: {name}: expected finite weights, found {bad} of {tensor.numel()} NaN or Inf; the file "
            "is damaged."
        )
    return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; isfinite of the whole would copy it."""
    # A NaN anywhere makes both ends NaN.
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in tensor.aminmax())


def check_int8(q: torch.Tensor, scale: torch.Tensor, source: str) -> None:
    """Refuse what FORMAT.md ("int8") refuses about a weight and its scales; `source` names file and
    tensor.
    """
    if q.dtype is not torch.int8 or scale.dtype is not torch.float32:
        raise CheckpointError(
            f"{source}: expected int8 with fp32 scales (the config says so), found {q.dtype} with "
            f"{scale.dtype}."
        )
    # Of the weights that they stand for, too: LIMIT times the largest scale of fp32 is not finite.
    if not bool((torch.isfinite(scale * LIMIT) & (scale >= 0)).all()):
        raise NonFiniteError(
            f"{source}: expected finite scales of at least 0, found others; the file is damaged."
        )
    if int(q.min()) < -LIMIT:
        raise CheckpointError(
            f"{source}: expected values from -{LIMIT} to {LIMIT}, found {int(q.min())}; quantise again."
        )


def read_weight(name: str, files: Headers, scales: Container[str]) -> Weight:
    """A tensor as it is stored, checked: floating point, or int8 where its scales are among `scales`."""
    tensor = _stored(name, files)
    if name + SCALE not in scales:
        return Weight(checked_tensor(tensor, name, files[name].path))
    scale = _stored(name + SCALE, files)
    check_int8(tensor, scale, f"{files[name].path}: {name}")
    return Weight(tensor, scale)


def _stored(name: str, files: Headers) -> torch.Tensor:
    with open_safetensors(files[name].path) as handle:
        return handle.get_tensor(files[name].name)


def _check_headers(block: FormatBlock, files: Headers, source: str, only_changed: bool = False) -> None:
    """Names, shapes, and int8 exactly where the block says so."""
    scales = block.expected_scales()
    check_names(
        {**block.expected_tensors(only_changed), **scales},
        {name: header.shape for name, header in files.items()},
        source,
    )
    for name, header in files.items():
        expected, dtypes = _kind(name, scales)
        if header.dtype not in dtypes:
            raise CheckpointError(
                f"{source}: {name}: expected {expected} (from its spec in the config), found {header.dtype}."
            )


def _kind(name: str, scales: Container[str]) -> tuple[str, tuple[str, ...]]:
    """How a tensor may be stored, in words and as safetensors spells it."""
    if name + SCALE in scales:
        return "int8", ("I8",)
    return ("fp32", ("F32",)) if name in scales else ("bf16, fp16 or fp32", _FLOATS)


def _check_outside(config: dict[str, Any], files: Headers, source: str, copied_head: bool) -> None:
    """What no config can leave out is there, in its shape: vLLM and NxD Inference would serve what their
    memory happens to hold. And nothing else is: an engine may know a tensor that we do not, and serve it
    unchecked. `copied_head`: a tied head may be stored too.
    """
    layers = mlp_shape(config, f"{source}/config.json").num_layers
    for key in ("num_attention_heads", "vocab_size"):
        if config.get(key) is None:
            raise CheckpointError(
                f"{source}/config.json: expected `{key}`, found none; the config is not usable."
            )
    expected = shapes_outside_mlps(config, layers)
    missing = [name for name in expected if name not in files]
    if missing:
        raise CheckpointError(
            f"{source}: expected a tensor {missing[0]} ({len(missing)} are missing), found "
            f"{_instead(missing[0], files)}."
        )
    for name, header in files.items():
        if header.shape != expected.get(name, header.shape):
            raise CheckpointError(
                f"{header.path}: {name}: expected shape {list(expected[name])} (from the config), found "
                f"{shown(list(header.shape))}."
            )
        if is_outside_mlps(name) and name not in expected and not (copied_head and name == _HEAD):
            raise CheckpointError(
                f"{header.path}: expected no tensor {name[:200]} (the model has no such part), found one; "
                "remove it, or mend the config."
            )


def _instead(missing: str, files: Headers) -> str:
    """What a folder without the tensor `missing` holds, as far as its names tell, and what to do."""
    packed = [name for name in files if name.endswith(_QUANTISED)]
    if packed:
        return f"{packed[0]}, which a quantised model has; name the model that it was made from"
    renamed = [name for name in files if name.endswith("." + missing) or missing.endswith("." + name)]
    if renamed:
        return f"{renamed[0]}; save the model again under the names that transformers gives"
    tied = ', or set "tie_word_embeddings": true if the embedding is the head' if missing == _HEAD else ""
    return f"none; the folder is incomplete, or its config is another model's: copy it again{tied}"


def check_all_read(checkpoint: Checkpoint) -> None:
    """A folder that is served has no safetensors file that is not read here: vLLM reads all that lie there,
    and would serve from the last one what was never checked.
    """
    read = {path.name for path in checkpoint.files}
    unread = [path.name for path in safetensors_in(checkpoint.folder) if path.name not in read]
    if unread:
        raise CheckpointError(
            f"{checkpoint.folder / unread[0]}: expected no weight file beside those of the checkpoint, found "
            "it; remove it."
        )


def _check_index(checkpoint: Checkpoint) -> None:
    """The index says of each tensor where it is: transformers reads what it names, in whichever folder."""
    path = checkpoint.folder / INDEX_FILE
    if path.is_file() and read_object(path).get("weight_map") != checkpoint.places():
        raise CheckpointError(
            f"{path}: expected `weight_map` to name the file of every tensor, found another; make the folder "
            "again, or remove the index to go without transformers."
        )


def check_names(
    expected: Mapping[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], source: str
) -> None:
    """Every factor there, with its shape, and no MLP tensor beside them (a misnamed one would load as random
    weights).
    """
    for name, size in expected.items():
        if name not in found:
            raise CheckpointError(
                f"{source}: expected a tensor {name} {list(size)}, found none; the folder contradicts its "
                "config."
            )
        if found[name] != size:
            raise CheckpointError(
                f"{source}: {name}: expected shape {list(size)} (from its spec in the config), found "
                f"{list(found[name])}."
            )
    for name in found:
        if ".mlp." in name and name not in expected:
            raise CheckpointError(
                f"{source}: expected no tensor {name[:200]} (the config has no such part), found one; remove "
                "it, or mend the config."
            )
