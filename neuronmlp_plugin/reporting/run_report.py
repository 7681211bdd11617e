"""What is known of a folder that was made, as one value: `neuronmlp_report.json` (docs/report.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from neuronmlp_plugin.calibration.quality import Quality

Row = dict[str, Any]  # of one matrix: compressor/build.py, MatrixError


@dataclasses.dataclass(frozen=True)
class Report:
    """`block` is that of FORMAT.md, `matrices` has a row a matrix. `quality` is that **of the weights in the
    folder**: a stage that changes them measures it again, or leaves None. What a run did not make is None.
    """

    block: dict[str, Any]
    matrices: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)
    quality: Quality | None = None
    judged_on: str | None = None
    weight_bytes: int | None = None
    bytes_ratio: float | None = None
    full_speed_tensor_parallel: list[int] = dataclasses.field(default_factory=list)
    ordinary: bool = False
    target: dict[str, Any] | None = None
    decode: dict[str, float] | None = None
    loss_by_size: list[dict[str, float]] | None = None
    spectra: dict[str, Any] | None = None
    samples: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    refinement: dict[str, Any] | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Report:
        """From JSON; keys that it does not know are left out. Raises KeyError or TypeError where something is
        missing.
        """
        known = {field.name: found[field.name] for field in dataclasses.fields(cls) if field.name in found}
        return cls(**{**known, "quality": Quality.of(known.get("quality"))})

    def to_json(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "quality": self.quality and self.quality.to_json()}

    @property
    def removed_ratio(self) -> float:
        return float(self.block["removed_ratio"])

    @property
    def provenance(self) -> dict[str, Any]:
        """Settings, calibration and digests."""
        return self.block.get("provenance") or {}

    @property
    def has_int8(self) -> bool:
        specs = [spec for layer in self.block.get("layers", []) for spec in layer.values()]
        return any(isinstance(spec, dict) and "dtype" in spec for spec in specs)
