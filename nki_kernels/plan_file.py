"""Choices of tile plans that a user's own device found best: a JSON file written by `neuronmlp bench tune`.

NKI_KERNELS_PLANS names the file that the planner looks into first; its content is part of `source_digest`,
since an artifact compiled with other plans is another program.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from typing import Any

from nki_kernels.layout import MATRICES
from nki_kernels.request import Request
from nki_kernels.tiling import Matrix

VARIABLE = "NKI_KERNELS_PLANS"
Choices = dict[str, dict[str, Any]]


def plan_key(request: Request) -> str:
    """One line that names everything a plan depends on besides the target, e.g. `T512 bfloat16
    gate_first=2048x1310 ... norm`.
    """
    parts = [f"T{request.tokens}", request.dtype.name]
    for name in MATRICES:
        matrix = request.layout.matrix(name)
        if matrix is not None:
            parts.append(f"{name}={_matrix_key(matrix)}")
    parts += [f"z:{name}" for name in request.layout.external_z]
    flags = {
        "int8": request.layout.is_int8,
        "norm": request.norm_eps is not None,
        "residual": request.residual,
        "silu": request.silu,
        "transposed": request.transposed_input,
    }
    return " ".join([*parts, *(name for name, on in flags.items() if on)])


def _matrix_key(matrix: Matrix) -> str:
    """All of a matrix but where its scales lie: `2048x1310/128`, and what is out of the ordinary behind."""
    parts = [f"{matrix.rows}x{matrix.cols}", str(matrix.tile_cols)]
    if matrix.pivot_axis:
        parts.append(f"{matrix.pivot_axis}:{matrix.pivots}+{matrix.shift}")
    if matrix.row_groups > 1 or matrix.col_groups > 1:
        parts.append(f"groups:{matrix.row_groups}x{matrix.col_groups}")
    parts += [name for name in ("halves", "twice") if getattr(matrix, name)]
    return "/".join(parts)


@functools.lru_cache(maxsize=4)
def read_choices(path: pathlib.Path) -> Choices:
    """Key -> fields of a `planner.Choice`. Raises ValueError where the file is no table of plans."""
    try:
        choices: Choices = json.loads(path.read_text(encoding="utf-8"))["choices"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} ({VARIABLE}): expected a table of plans by `neuronmlp bench tune`, found {error!r}; "
            "write it anew or unset the variable."
        ) from error
    return choices


def chosen_file() -> pathlib.Path | None:
    """The file that NKI_KERNELS_PLANS names."""
    name = os.environ.get(VARIABLE)
    return pathlib.Path(name) if name else None


def own_choice(request: Request) -> dict[str, Any] | None:
    """Fields of the user's own choice for this launch, or None."""
    path = chosen_file()
    return None if path is None else read_choices(path).get(plan_key(request))
