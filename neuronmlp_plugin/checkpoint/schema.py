"""The block of FORMAT.md as data: what a folder says about each projection, checked against the rest of its
config.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from neuronmlp_plugin.errors import CheckpointError, FormatVersionError
from neuronmlp_plugin.models.projection import (
    DENSE,
    FORMS,
    INT8,
    PROJECTIONS,
    MLPShape,
    ProjectionSpec,
    parameter_count,
    scale_shapes,
    tensor_shapes,
    weight_bytes,
)

FORMAT_VERSION = 1
INT8_VERSION = 2  # of a block with int8 matrices, which readers of version 1 cannot read
QUANT_METHOD = "neuronmlp"
_PROJECTION_NAME = re.compile(r"^model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)$")


def shard_name(position: int, count: int) -> str:
    """File name of shard `position`, counted from 1."""
    return f"neuronmlp-{position:05d}-of-{count:05d}.safetensors"


@dataclasses.dataclass(frozen=True)
class FormatBlock:
    """The self-describing block of `config.json` (FORMAT.md, "The block").

    `layers[i][projection]` is the spec of each matrix; `provenance` is free-form and never interpreted.
    """

    layers: tuple[dict[str, ProjectionSpec], ...]
    shape: MLPShape
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    created_by: str = "neuronmlp"

    @property
    def removed_ratio(self) -> float:
        """Share of all gate, up and down parameters that is not stored."""
        dense = sum(parameter_count(p, DENSE, self.shape) for _ in self.layers for p in PROJECTIONS)
        kept = sum(parameter_count(p, spec, self.shape) for layer in self.layers for p, spec in layer.items())
        return 1.0 - kept / dense

    @property
    def has_int8(self) -> bool:
        return any(spec.is_int8 for layer in self.layers for spec in layer.values())

    @property
    def format_version(self) -> int:
        """The lowest version that has all that the block uses."""
        return INT8_VERSION if self.has_int8 else FORMAT_VERSION

    @property
    def weight_bytes(self) -> int:
        """Bytes of all gate, up and down matrices as served (`models.projection.weight_bytes`)."""
        return sum(weight_bytes(p, spec, self.shape) for layer in self.layers for p, spec in layer.items())

    @property
    def bytes_ratio(self) -> float:
        """`weight_bytes` over those of the dense model in bf16: how int8 and low rank compare."""
        return self.weight_bytes / sum(
            weight_bytes(p, DENSE, self.shape) for _ in self.layers for p in PROJECTIONS
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "created_by": self.created_by,
            "removed_ratio": round(self.removed_ratio, 6),
            "layers": [{name: layer[name].to_json() for name in PROJECTIONS} for layer in self.layers],
            "provenance": self.provenance,
        }

    def spec(self, name: str) -> ProjectionSpec | None:
        """Spec of the module `name` ("model.layers.3.mlp.up_proj"), or None where it is no MLP projection."""
        match = _PROJECTION_NAME.match(name)
        return self.layers[int(match[1])][match[2]] if match else None

    def expected_tensors(self, only_changed: bool = False) -> dict[str, tuple[int, int]]:
        """Full name -> shape of every MLP weight; `only_changed` leaves out layers that are the base's own
        throughout.
        """
        return {
            f"{name}.{suffix}": size
            for name, projection, spec in self._projections(only_changed)
            for suffix, size in tensor_shapes(projection, spec, self.shape).items()
        }

    def expected_scales(self) -> dict[str, tuple[int]]:
        """Full name -> shape of the scales of every int8 weight."""
        return {
            f"{name}.{suffix}": size
            for name, projection, spec in self._projections()
            for suffix, size in scale_shapes(projection, spec, self.shape).items()
        }

    def _projections(self, only_changed: bool = False) -> Iterator[tuple[str, str, ProjectionSpec]]:
        """Full name, projection and spec of every matrix."""
        for index, layer in enumerate(self.layers):
            if not only_changed or any(spec != DENSE for spec in layer.values()):
                for projection, spec in layer.items():
                    yield f"model.layers.{index}.mlp.{projection}", projection, spec


def mlp_shape(config: dict[str, Any], source: str) -> MLPShape:
    """Read the MLP sizes from a Hugging Face config; `source` names it in errors."""
    sizes = []
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        value = config.get(key)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{source}: expected a positive integer `{key}`, found {value!r}; the config is not usable."
            )
        sizes.append(value)
    return MLPShape(*sizes)


def parse_block(block: dict[str, Any], config: dict[str, Any], source: str) -> FormatBlock:
    """Check a block against FORMAT.md and the rest of the config; `source` names the file in errors.

    Raises FormatVersionError for another version and CheckpointError for every contradiction.
    """
    version = block.get("format_version")
    if type(version) is not int or version not in (FORMAT_VERSION, INT8_VERSION):
        raise FormatVersionError(
            f"{source}: expected neuronmlp format_version {FORMAT_VERSION} or {INT8_VERSION}, found {version!r}; "
            "use the neuronmlp release that wrote the checkpoint, or compress again."
        )
    shape = mlp_shape(config, source)
    layers = block.get("layers")
    if not isinstance(layers, list) or len(layers) != shape.num_layers:
        found = f"{len(layers)} entries" if isinstance(layers, list) else repr(layers)
        raise CheckpointError(
            f"{source}: expected `layers` with {shape.num_layers} entries (num_hidden_layers), found {found}."
        )
    provenance = block.get("provenance") or {}
    if not isinstance(provenance, dict):
        raise CheckpointError(
            f"{source}: expected `provenance` to be an object, found {type(provenance).__name__}."
        )
    parsed = tuple(_parse_layer(layer, index, shape, source) for index, layer in enumerate(layers))
    result = FormatBlock(parsed, shape, provenance, str(block.get("created_by", "unknown")))
    if version != result.format_version:
        raise CheckpointError(
            f"{source}: expected format_version {result.format_version} ({INT8_VERSION} where a matrix is int8, else {FORMAT_VERSION}), "
            f"found {version}; the block was edited or damaged."
        )
    _check_ratio(block.get("removed_ratio"), result, source)
    return result


def _check_ratio(claimed: Any, block: FormatBlock, source: str) -> None:
    if (
        not isinstance(claimed, (int, float)) or not abs(claimed - block.removed_ratio) <= 1e-3
    ):  # NaN is near nothing
        raise CheckpointError(
            f"{source}: expected removed_ratio {block.removed_ratio:.4f} (what the forms and ranks give), found {claimed!r}; "
            "the block was edited or damaged."
        )


def _parse_layer(layer: Any, index: int, shape: MLPShape, source: str) -> dict[str, ProjectionSpec]:
    if not isinstance(layer, dict) or sorted(layer) != sorted(PROJECTIONS):
        found = sorted(layer) if isinstance(layer, dict) else layer
        raise CheckpointError(
            f"{source}: layers[{index}]: expected exactly {', '.join(PROJECTIONS)}, found {found!r}."
        )
    return {
        name: _parse_spec(layer[name], f"{source}: layers[{index}].{name}", shape.in_out(name))
        for name in PROJECTIONS
    }


def _parse_spec(entry: Any, where: str, in_out: tuple[int, int]) -> ProjectionSpec:
    form, rank, dtype = (
        (entry.get("form"), entry.get("rank"), entry.get("dtype"))
        if isinstance(entry, dict)
        else (None, None, None)
    )
    if form not in FORMS:
        raise CheckpointError(f"{where}: expected a form of {', '.join(FORMS)}, found {form!r}.")
    if dtype not in (None, INT8):
        raise CheckpointError(f"{where}: expected dtype {INT8!r} or none, found {dtype!r}.")
    if form == "dense":
        if rank is not None:
            raise CheckpointError(f"{where}: expected no rank for a dense matrix, found {rank!r}.")
        return ProjectionSpec(form, dtype=dtype)
    limit = min(in_out) - (form == "compact")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= limit:
        raise CheckpointError(
            f"{where}: expected a rank from 1 to {limit} for {form} of {in_out[1]} x {in_out[0]}, found {rank!r}."
        )
    return ProjectionSpec(form, rank, dtype)
