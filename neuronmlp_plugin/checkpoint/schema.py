"""The block of FORMAT.md as data: what a folder says about each MLP, checked against the rest of its
config.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from neuronmlp_plugin.errors import CheckpointError, FormatVersionError, shown
from neuronmlp_plugin.models.factors import (
    DENSE,
    FORMS,
    INT8,
    PROJECTIONS,
    Matrix,
    MLPLayer,
    MLPShape,
    ProjectionSpec,
    full_speed_sizes,
)

FORMAT_VERSION = 1
QUANT_METHOD = "neuronmlp"
# Which shard holds which tensor, for transformers (neuronmlp_plugin/hf.py); not by the name that every engine
# looks for, since one that does not know the block would invent the MLPs that it does not find.
INDEX_FILE = "neuronmlp.safetensors.index.json"
CHANNELS = "intermediate_size"  # key of a layer that keeps fewer channels than the config says
# Engines put a prefix before the name: "draft_model." of the small model that guesses for a large one.
_MLP_NAME = re.compile(r"(?:.*\.)?model\.layers\.(\d+)\.mlp")


def shard_name(position: int, count: int) -> str:
    """File name of shard `position`, counted from 1."""
    return f"neuronmlp-{position:05d}-of-{count:05d}.safetensors"


def mlp_name(index: int) -> str:
    """Full name of a layer's MLP, before that of a projection."""
    return f"model.layers.{index}.mlp"


@dataclasses.dataclass(frozen=True)
class FormatBlock:
    """The self-describing block of `config.json` (FORMAT.md, "The block").

    `shape` is that of the base model, `groups` are those of every low-rank layer; `provenance` is free-form
    and never interpreted.
    """

    layers: tuple[MLPLayer, ...]
    shape: MLPShape
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    created_by: str = "neuronmlp"

    def __post_init__(self) -> None:
        assert len({layer.groups for layer in self.layers}) == 1, (
            "all layers of a folder have the same groups"
        )

    @property
    def groups(self) -> int:
        """One number for the whole folder: that of its layers, which all have the same."""
        return self.layers[0].groups

    @property
    def removed_ratio(self) -> float:
        """Share of all gate, up and down parameters of the base model that is not stored."""
        return 1.0 - sum(layer.parameters for layer in self.layers) / sum(
            layer.parameters for layer in self._base_layers()
        )

    @property
    def has_int8(self) -> bool:
        return any(spec.is_int8 for layer in self.layers for spec in layer.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all gate, up and down matrices as served (`Matrix.weight_bytes`)."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def bytes_ratio(self) -> float:
        """`weight_bytes` over those of the dense model in bf16: how int8 and low rank compare."""
        return self.weight_bytes / sum(layer.weight_bytes for layer in self._base_layers())

    @property
    def full_speed_sizes(self) -> list[int]:
        """The tensor-parallel sizes at which no layer communicates more than a dense one."""
        return full_speed_sizes(self.layers)

    @property
    def ordinary_size(self) -> int | None:
        """The one smaller `intermediate_size` of all layers, where they are dense in floating point and
        nothing else: such a folder needs no block (FORMAT.md, "A folder without the block").
        """
        sizes = {layer.channels for layer in self.layers}
        plain = all(spec == DENSE for layer in self.layers for spec in layer.values())
        size = max(sizes)
        return size if plain and len(sizes) == 1 and size < self.shape.intermediate_size else None

    def to_json(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "created_by": self.created_by,
            "removed_ratio": round(self.removed_ratio, 6),
            "groups": self.groups,
            "layers": [self._layer_json(layer) for layer in self.layers],
            "provenance": self.provenance,
        }

    def _layer_json(self, layer: MLPLayer) -> dict[str, Any]:
        narrow = {CHANNELS: layer.channels} if layer.channels < self.shape.intermediate_size else {}
        return {**narrow, **{name: spec.to_json() for name, spec in layer.items()}}

    def mlp(self, name: str) -> MLPLayer | None:
        """The MLP of the module `name` ("model.layers.3.mlp"), or None where it is none."""
        match = _MLP_NAME.fullmatch(name)
        return self.layers[int(match[1])] if match else None

    def expected_tensors(self, only_changed: bool = False) -> dict[str, tuple[int, int]]:
        """Full name -> shape of every MLP weight; `only_changed` leaves out layers that are the base's own
        throughout.
        """
        return {
            f"{name}.{suffix}": size
            for name, matrix in self._matrices(only_changed)
            for suffix, size in matrix.tensor_shapes().items()
        }

    def expected_scales(self) -> dict[str, tuple[int]]:
        """Full name -> shape of the scales of every int8 weight."""
        return {
            f"{name}.{suffix}": size
            for name, matrix in self._matrices()
            for suffix, size in matrix.scale_shapes().items()
        }

    def _matrices(self, only_changed: bool = False) -> Iterator[tuple[str, Matrix]]:
        """Full name of every projection and its matrix."""
        for index, layer in enumerate(self.layers):
            if not only_changed or not layer.is_base(self.shape):
                for projection, matrix in layer.matrices.items():
                    yield f"{mlp_name(index)}.{projection}", matrix

    def _base_layers(self) -> tuple[MLPLayer, ...]:
        return base_layers(self.shape)


def base_layers(shape: MLPShape) -> tuple[MLPLayer, ...]:
    """The layers of the base model."""
    return (MLPLayer.of(shape, dict.fromkeys(PROJECTIONS, DENSE)),) * shape.num_layers


# Far beyond every model, and small enough that whatever is done for each of them is done in a moment.
MOST = {"hidden_size": 1 << 18, "intermediate_size": 1 << 20, "num_hidden_layers": 1 << 12}
_MOST_BESIDE = {
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 24,
}


def mlp_shape(config: dict[str, Any], source: str) -> MLPShape:
    """Read the MLP sizes from a Hugging Face config, whose other sizes are looked at too where it has them;
    `source` names it in errors.
    """
    beside = {key: most for key, most in _MOST_BESIDE.items() if config.get(key) is not None}
    for key, most in {**MOST, **beside}.items():
        value: Any = config.get(key)
        if not _is_count(value, most):
            raise CheckpointError(
                f"{source}: expected a whole number `{key}` from 1 to {most:,}, found {shown(value)}; "
                "the config is not usable."
            )
    return MLPShape(*(config[key] for key in MOST))


def parse_block(block: dict[str, Any], config: dict[str, Any], source: str) -> FormatBlock:
    """Check a block against FORMAT.md and the rest of the config; `source` names the file in errors.

    Raises FormatVersionError for another version and CheckpointError for every contradiction.
    """
    version = block.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{source}: expected neuronmlp format_version {FORMAT_VERSION}, found {shown(version)}; "
            "use the neuronmlp release that wrote the checkpoint, or compress again."
        )
    shape = mlp_shape(config, source)
    layers = block.get("layers")
    if not isinstance(layers, list) or len(layers) != shape.num_layers:
        found = f"{len(layers)} entries" if isinstance(layers, list) else shown(layers)
        raise CheckpointError(
            f"{source}: expected `layers` with {shape.num_layers} entries (num_hidden_layers), found {found}."
        )
    provenance = block.get("provenance") or {}
    if not isinstance(provenance, dict):
        raise CheckpointError(
            f"{source}: expected `provenance` to be an object, found {type(provenance).__name__}."
        )
    groups = block.get("groups")
    if not _is_count(groups, shape.intermediate_size):
        raise CheckpointError(
            f"{source}: expected `groups` from 1 to the {shape.intermediate_size} channels, found "
            f"{shown(groups)}."
        )
    parsed = tuple(
        _parse_layer(layer, f"{source}: layers[{index}]", shape, groups) for index, layer in enumerate(layers)
    )
    result = FormatBlock(parsed, shape, provenance, str(block.get("created_by", "unknown"))[:200])
    _check_ratio(block.get("removed_ratio"), result, source)
    return result


def _is_count(value: Any, limit: int) -> bool:
    # Not isinstance: True is an int, and JSON's true is no count.
    return type(value) is int and 1 <= value <= limit


def _check_ratio(claimed: Any, block: FormatBlock, source: str) -> None:
    # Asked before anything is subtracted from it: JSON may hold the integer 10^400, which no float takes.
    found = isinstance(claimed, (int, float)) and -1 <= claimed <= 1
    if not found or not abs(claimed - block.removed_ratio) <= 1e-3:
        raise CheckpointError(
            f"{source}: expected removed_ratio {block.removed_ratio:.4f} (what the forms and ranks give), "
            f"found {shown(claimed)}; the block was edited or damaged."
        )


def _parse_layer(layer: Any, where: str, shape: MLPShape, groups: Any) -> MLPLayer:
    names = sorted(set(layer) - {CHANNELS}) if isinstance(layer, dict) else layer
    if names != sorted(PROJECTIONS):
        raise CheckpointError(f"{where}: expected exactly {', '.join(PROJECTIONS)}, found {shown(names)}.")
    channels = layer.get(CHANNELS, shape.intermediate_size)
    if not _is_count(channels, shape.intermediate_size) or channels % groups:
        raise CheckpointError(
            f"{where}: expected {CHANNELS} from 1 to {shape.intermediate_size} that {groups} groups divide, "
            f"found {shown(channels)}."
        )
    specs = {name: _parse_spec(layer[name], f"{where}.{name}") for name in PROJECTIONS}
    parsed = MLPLayer.of(shape, specs, channels=channels, groups=groups)
    for name, matrix in parsed.matrices.items():
        _check_rank(matrix, f"{where}.{name}")
    return parsed


def _parse_spec(entry: Any, where: str) -> ProjectionSpec:
    given = entry if isinstance(entry, dict) else {}
    form, rank, dtype = given.get("form"), given.get("rank"), given.get("dtype")
    if form not in FORMS:
        raise CheckpointError(f"{where}: expected a form of {', '.join(FORMS)}, found {shown(form)}.")
    if dtype not in (None, INT8):
        raise CheckpointError(f"{where}: expected dtype {INT8!r} or none, found {shown(dtype)}.")
    return ProjectionSpec(form, rank, dtype)


def _check_rank(matrix: Matrix, where: str) -> None:
    rank = matrix.spec.rank
    if not matrix.spec.is_low_rank:
        if rank is not None:
            raise CheckpointError(f"{where}: expected no rank for a dense matrix, found {shown(rank)}.")
    elif not _is_count(rank, matrix.max_rank):
        n_in, n_out = matrix.in_out
        parts = f" in {matrix.groups} groups" if matrix.groups > 1 else ""
        raise CheckpointError(
            f"{where}: expected a rank from 1 to {matrix.max_rank} for {matrix.spec.form} of {n_out} x "
            f"{n_in}{parts}, found {shown(rank)}."
        )
