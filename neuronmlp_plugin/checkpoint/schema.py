"""The block of FORMAT.md as data: what a folder says about each projection, checked against the rest of its config."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from neuronmlp_plugin.errors import CheckpointError, FormatVersionError
from neuronmlp_plugin.models.projection import (
    DENSE,
    FORMS,
    PROJECTIONS,
    MLPShape,
    ProjectionSpec,
    parameter_count,
    tensor_shapes,
)

FORMAT_VERSION = 1
QUANT_METHOD = "neuronmlp"
_PROJECTION_NAME = re.compile(r"^model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)$")


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

    def to_json(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
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
        """Full name -> shape of every MLP tensor; `only_changed` leaves out layers that are dense throughout."""
        names = {}
        for index, layer in enumerate(self.layers):
            if only_changed and all(spec.form == "dense" for spec in layer.values()):
                continue
            for projection, spec in layer.items():
                for suffix, size in tensor_shapes(projection, spec, self.shape).items():
                    names[f"model.layers.{index}.mlp.{projection}.{suffix}"] = size
        return names


def mlp_shape(config: dict[str, Any], source: str) -> MLPShape:
    """Read the MLP sizes from a Hugging Face config; `source` names it in errors."""
    sizes = []
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        value = config.get(key)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{source}: expected a positive integer `{key}`, found {value!r}; the config is not usable.")
        sizes.append(value)
    return MLPShape(*sizes)


def parse_block(block: dict[str, Any], config: dict[str, Any], source: str) -> FormatBlock:
    """Check a block against FORMAT.md and the rest of the config; `source` names the file in errors.

    Raises FormatVersionError for another version and CheckpointError for every contradiction.
    """
    version = block.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{source}: expected neuronmlp format_version {FORMAT_VERSION}, found {version!r}; "
            "use the neuronmlp release that wrote the checkpoint, or compress again."
        )
    shape = mlp_shape(config, source)
    layers = block.get("layers")
    if not isinstance(layers, list) or len(layers) != shape.num_layers:
        found = f"{len(layers)} entries" if isinstance(layers, list) else repr(layers)
        raise CheckpointError(f"{source}: expected `layers` with {shape.num_layers} entries (num_hidden_layers), found {found}.")
    parsed = tuple(_parse_layer(layer, index, shape, source) for index, layer in enumerate(layers))
    result = FormatBlock(parsed, shape, block.get("provenance") or {}, str(block.get("created_by", "unknown")))
    _check_ratio(block.get("removed_ratio"), result, source)
    return result


def _check_ratio(claimed: Any, block: FormatBlock, source: str) -> None:
    if not isinstance(claimed, (int, float)) or abs(claimed - block.removed_ratio) > 1e-3:
        raise CheckpointError(
            f"{source}: expected removed_ratio {block.removed_ratio:.4f} (what the forms and ranks give), found {claimed!r}; "
            "the block was edited or damaged."
        )


def _parse_layer(layer: Any, index: int, shape: MLPShape, source: str) -> dict[str, ProjectionSpec]:
    if not isinstance(layer, dict) or sorted(layer) != sorted(PROJECTIONS):
        found = sorted(layer) if isinstance(layer, dict) else layer
        raise CheckpointError(f"{source}: layers[{index}]: expected exactly {', '.join(PROJECTIONS)}, found {found!r}.")
    return {name: _parse_spec(layer[name], f"{source}: layers[{index}].{name}", shape.in_out(name)) for name in PROJECTIONS}


def _parse_spec(entry: Any, where: str, in_out: tuple[int, int]) -> ProjectionSpec:
    form, rank = (entry.get("form"), entry.get("rank")) if isinstance(entry, dict) else (None, None)
    if form not in FORMS:
        raise CheckpointError(f"{where}: expected a form of {', '.join(FORMS)}, found {form!r}.")
    if form == "dense":
        if rank is not None:
            raise CheckpointError(f"{where}: expected no rank for a dense matrix, found {rank!r}.")
        return DENSE
    limit = min(in_out) - (form == "compact")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= limit:
        raise CheckpointError(f"{where}: expected a rank from 1 to {limit} for {form} of {in_out[1]} x {in_out[0]}, found {rank!r}.")
    return ProjectionSpec(form, rank)
