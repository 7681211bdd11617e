"""Plans that the cost model found beforehand, by what they are for: `tables/<target>.json`, made by
`neuronmlp bench tune`.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import TYPE_CHECKING, Any

from nki_kernels.layout import MATRICES

if TYPE_CHECKING:
    from nki_kernels.planner import Request

FOLDER = pathlib.Path(__file__).parent / "tables"


def key(request: Request) -> str:
    """One line that names everything a plan depends on besides the target, e.g. `T512 bfloat16
    gate_first=2048x1310 ... norm`.
    """
    parts = [f"T{request.tokens}", request.dtype.name]
    for name in MATRICES:
        matrix = request.layout.matrix(name)
        if matrix is not None:
            pivots = f"/{matrix.pivot_axis}:{matrix.pivots}+{matrix.shift}" if matrix.pivot_axis else ""
            parts.append(f"{name}={matrix.rows}x{matrix.cols}/{matrix.tile_cols}{pivots}")
    parts += [f"z:{name}" for name in request.layout.external_z]
    flags = {
        "norm": request.norm_eps is not None,
        "residual": request.residual,
        "silu": request.silu,
        "transposed": request.transposed_input,
    }
    return " ".join([*parts, *(name for name, on in flags.items() if on)])


@functools.cache
def table(target: str) -> dict[str, dict[str, Any]]:
    """Key -> fields of a `planner.Choice`; empty where nothing was tuned for the target."""
    path = FOLDER / f"{target}.json"
    if not path.exists():
        return {}
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["choices"]
    return entries


def tuned_choice(request: Request, target: str) -> dict[str, Any] | None:
    """Fields of the tuned `planner.Choice`, or None."""
    return table(target).get(key(request))
