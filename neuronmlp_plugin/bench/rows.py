"""One result, one row: what, of which case, in which unit, and where the number comes from."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib.metadata
import pathlib
import platform
from collections.abc import Iterable


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@dataclasses.dataclass(frozen=True)
class Row:
    """`origin` is "measured" or "simulated"; the two never share a column."""

    case: str
    metric: str
    unit: str
    value: float
    origin: str
    target: str = dataclasses.field(default_factory=lambda: f"{platform.machine()} cpu")
    versions: str = dataclasses.field(
        default_factory=lambda: (
            f"neuronmlp {_version('neuronmlp')}, vllm {_version('vllm')}, torch {_version('torch')}"
        )
    )
    date: str = dataclasses.field(default_factory=lambda: datetime.date.today().isoformat())


def append_rows(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Append to a CSV file, with a header where it is new."""
    names = [field.name for field in dataclasses.fields(Row)]
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        if fresh:
            writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
