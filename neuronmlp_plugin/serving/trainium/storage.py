"""How a path reads the int8 matrices of a layer: as they are, one byte a weight, or expanded at load, and
why.

Torch operations multiply each matrix by itself. A launch of the kernels reads one packed array, so there all
three are int8 or none is.
"""

from __future__ import annotations

import dataclasses

import torch

from neuronmlp_plugin.models.definition import Tensors, factors_of, tensors_of
from neuronmlp_plugin.models.factors import INT8, PROJECTIONS, Matrix, MLPLayer

FLOATING, IN_PART, EXPANDED = "floating point", "int8 in part", "int8 expanded"


@dataclasses.dataclass(frozen=True)
class Reading:
    """`int8`: the projections that are read as int8; `why`: why others, stored so, are expanded, if any
    is.
    """

    int8: frozenset[str] = frozenset()
    why: str | None = None

    @property
    def weights(self) -> str:
        """In a word, for the log and /metrics: INT8 where all are, IN_PART where the others are stored in
        floating point.
        """
        if self.why:
            return EXPANDED
        if len(self.int8) == len(PROJECTIONS):
            return INT8
        return IN_PART if self.int8 else FLOATING

    def tensors(self, matrix: Matrix, stored: Tensors, dtype: torch.dtype) -> Tensors:
        """The tensors of FORMAT.md of one matrix as they are read: expanded to `dtype`, and then without
        scales, where it is int8 and cannot stay so.
        """
        if not matrix.spec.is_int8 or matrix.projection in self.int8:
            return stored
        factors = factors_of(matrix, stored)
        return tensors_of(matrix, *(None if w is None else w.expanded().to(dtype) for w in factors))


def kernel_reading(stored: MLPLayer, tp: int) -> Reading:
    """How the kernels of one of tp ranks read the layer."""
    int8, floating = _stored_int8(stored), [name for name, spec in stored.items() if not spec.is_int8]
    if not int8:
        return Reading()
    if floating:
        return Reading(
            why=f"{', '.join(floating)} in floating point beside, and a launch reads one kind of weights"
        )
    why = _odd_pivots(stored.matrix("down_proj"), tp, stored.gathers(tp))
    return Reading(why=why) if why else Reading(int8)


def torch_reading(stored: MLPLayer, tp: int, dtype: torch.dtype) -> Reading:
    """How torch operations of one of tp ranks read the layer, in a model of `dtype`."""
    int8 = _stored_int8(stored)
    if not int8:
        return Reading()
    if dtype is torch.float16:
        return Reading(why="unscaled products may leave the range of float16")
    down = stored.matrix("down_proj")
    why = _odd_pivots(down, tp, stored.gathers(tp)) if down.spec.is_int8 else None
    return Reading(int8 - {"down_proj"}, why) if why else Reading(int8)


def _stored_int8(stored: MLPLayer) -> frozenset[str]:
    return frozenset(name for name, spec in stored.items() if spec.is_int8)


def _odd_pivots(down: Matrix, tp: int, gathers: bool) -> str | None:
    """Under `gather` some ranks own one pivot more, which becomes a unit column (layout.py): ones, in rows
    whose scales are others.
    """
    if not gathers or down.pivots % tp == 0:
        return None
    return (
        f"{tp} ranks share the {down.pivots} pivots of down_proj unevenly, and the odd ones have no scale; "
        f"compress with --tp {tp} to share groups out instead"
    )
