"""The vocabulary of FORMAT.md: how a matrix is stored, and how the three of an MLP layer belong together.

Only here (and in models/definition.py, for numbers) is it known which tensors a form has, what they are
called, which shapes they have, and where a tensor-parallel rank's share of them begins. Whoever computes with
a matrix speaks of its `first` factor, which meets the input, and its `second`, which makes the output. A
dense gate or up has only a first, a dense down only a second. No torch here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from neuronmlp_plugin.errors import UsageError

FORMS = ("dense", "uv", "compact")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
INT8 = "int8"
SCALE = "_scale"  # added to a weight's name: the name of its scales
OUT, IN = 0, 1  # dimensions of a weight `[out, in]`


@dataclasses.dataclass(frozen=True)
class ProjectionSpec:
    """How one matrix is stored: its form, its rank (of each group) unless it is `dense`, and INT8 as `dtype`
    unless its weights are floating point.
    """

    form: str
    rank: int | None = None
    dtype: str | None = None

    @property
    def is_low_rank(self) -> bool:
        return self.form != "dense"

    @property
    def is_int8(self) -> bool:
        return self.dtype == INT8

    def to_json(self) -> dict[str, Any]:
        given = {"form": self.form, "rank": self.rank, "dtype": self.dtype}
        return {key: value for key, value in given.items() if value is not None}


DENSE = ProjectionSpec("dense")


@dataclasses.dataclass(frozen=True)
class MLPShape:
    """Sizes of the gated MLPs of the base model: H hidden, I intermediate, and how many layers have one."""

    hidden_size: int
    intermediate_size: int
    num_layers: int

    def in_out(self, projection: str) -> tuple[int, int]:
        """`(in, out)` of a projection of the base model."""
        return _in_out(projection, self.hidden_size, self.intermediate_size)


def _in_out(projection: str, hidden: int, channels: int) -> tuple[int, int]:
    return (channels, hidden) if projection == "down_proj" else (hidden, channels)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One matrix of a layer: `[out, in]` with `channels` intermediate channels on one side, in `groups` equal
    parts, each of which has factors of its own at the one rank of `spec`.

    Gate, H 8, 12 channels, 2 groups, uv of rank 3: u is 2 stacked `[3, 8]`, v 2 stacked `[6, 3]`; channels
    0-5 come from rows 0-2 of u, channels 6-11 from rows 3-5.

    >>> Matrix("gate_proj", ProjectionSpec("uv", 3), hidden_size=8, channels=12, groups=2).tensor_shapes()
    {'u.weight': (6, 8), 'v.weight': (12, 3)}
    """

    projection: str
    spec: ProjectionSpec
    hidden_size: int
    channels: int
    groups: int = 1

    @property
    def is_down(self) -> bool:
        return self.projection == "down_proj"

    @property
    def in_out(self) -> tuple[int, int]:
        return _in_out(self.projection, self.hidden_size, self.channels)

    @property
    def rank(self) -> int:
        """Of each group; 0 for a dense matrix."""
        return self.spec.rank or 0

    @property
    def pivots(self) -> int:
        """How many channels of each group, its first ones, are themselves z: the rank of a `compact`
        matrix.
        """
        return self.rank if self.spec.form == "compact" else 0

    @property
    def max_rank(self) -> int:
        """The largest rank of a group that the form has; a compact one keeps at least one channel beside its
        pivots.
        """
        return min(self.hidden_size, self.channels // self.groups) - (self.spec.form == "compact")

    @property
    def suffixes(self) -> tuple[str, str]:
        """Names of the first and the second factor behind the projection's; "" for one that there is not."""
        if not self.spec.is_low_rank:
            return ("", "weight") if self.is_down else ("weight", "")
        if self.spec.form == "uv":
            return "u.weight", "v.weight"
        return ("c.weight", "v.weight") if self.is_down else ("u.weight", "c.weight")

    @property
    def blocks(self) -> tuple[int, int]:
        """Into how many blocks, one a group, the first and the second factor fall. The other one joins the
        groups (down's second) or is shared by the input (gate's and up's first), and is one block.
        """
        if not self.spec.is_low_rank:
            return 1, 1
        return (self.groups, 1) if self.is_down else (1, self.groups)

    @property
    def factor_shapes(self) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """`[out, in]` of the first and the second factor as they are stored: a factor in blocks is the blocks
        one below another.
        """
        n_in, n_out = self.in_out
        if not self.spec.is_low_rank:
            return (None, (n_out, n_in)) if self.is_down else ((n_out, n_in), None)
        all_ranks, pivots = self.groups * self.rank, self.pivots
        if self.is_down:
            # Pivots are stored nowhere: in a compact matrix their part of a factor is an identity, of each
            # group.
            return (all_ranks, n_in // self.groups - pivots), (n_out, all_ranks)
        return (all_ranks, n_in), (n_out - self.groups * pivots, self.rank)

    def tensor_shapes(self) -> dict[str, tuple[int, int]]:
        """Suffix -> `[out, in]` shape of every weight that stores the matrix (FORMAT.md, "Tensors")."""
        named = zip(self.suffixes, self.factor_shapes, strict=True)
        return {suffix: shape for suffix, shape in named if shape is not None}

    def scale_shapes(self) -> dict[str, tuple[int]]:
        """Suffix -> `[out]` shape of the scales beside the weights; none unless the matrix is int8."""
        weights = self.tensor_shapes() if self.spec.is_int8 else {}
        return {suffix + SCALE: (size[0],) for suffix, size in weights.items()}

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of all that is stored for the matrix: weights and scales."""
        return {**self.tensor_shapes(), **self.scale_shapes()}

    @property
    def parameters(self) -> int:
        """Numbers stored for the matrix, without scales."""
        return sum(rows * cols for rows, cols in self.tensor_shapes().values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrix as it is served: int8 weights with their fp32 scales, floating point in
        bf16.
        """
        scales = sum(rows for (rows,) in self.scale_shapes().values())
        return self.parameters * (1 if self.spec.is_int8 else 2) + 4 * scales

    def split_dim(self, suffix: str) -> int:
        """Along which dimension contiguous equal parts of a weight are the shares of tensor-parallel
        ranks.
        """
        # Down's second factor joins the groups: they have its columns. Everything else has a group's numbers
        # in rows.
        return IN if self.is_down and suffix == self.suffixes[1] else OUT


@dataclasses.dataclass(frozen=True)
class MLPLayer(Mapping[str, ProjectionSpec]):
    """The three matrices of one layer, a mapping from PROJECTIONS to their specs: `channels` of the base
    model's I are kept, in `groups` equal groups.
    """

    hidden_size: int
    channels: int
    gate_proj: ProjectionSpec
    up_proj: ProjectionSpec
    down_proj: ProjectionSpec
    groups: int = 1

    @classmethod
    def of(
        cls,
        shape: MLPShape,
        specs: Mapping[str, ProjectionSpec],
        *,
        channels: int | None = None,
        groups: int = 1,
    ) -> MLPLayer:
        """A layer of a model of `shape`, with all its channels unless `channels` says how many."""
        kept = shape.intermediate_size if channels is None else channels
        return cls(shape.hidden_size, kept, groups=groups, **{name: specs[name] for name in PROJECTIONS})

    def __getitem__(self, projection: str) -> ProjectionSpec:
        # Not getattr: a Mapping owes a KeyError for every other name, and `groups` is an attribute, too.
        return {"gate_proj": self.gate_proj, "up_proj": self.up_proj, "down_proj": self.down_proj}[projection]

    def __iter__(self) -> Iterator[str]:
        return iter(PROJECTIONS)

    def __len__(self) -> int:
        return len(PROJECTIONS)

    def with_specs(self, specs: Mapping[str, ProjectionSpec]) -> MLPLayer:
        """The same channels and groups, with some matrices stored otherwise."""
        changed: dict[str, Any] = {**self, **specs}
        return dataclasses.replace(self, **changed)

    def matrix(self, projection: str) -> Matrix:
        return Matrix(projection, self[projection], self.hidden_size, self.channels, self.groups)

    @property
    def matrices(self) -> dict[str, Matrix]:
        return {projection: self.matrix(projection) for projection in PROJECTIONS}

    @property
    def is_low_rank(self) -> bool:
        """Whether any matrix is not dense."""
        return any(spec.is_low_rank for spec in self.values())

    def is_base(self, shape: MLPShape) -> bool:
        """Whether the layer is that of the base model, unchanged in all but values."""
        return self.channels == shape.intermediate_size and all(spec == DENSE for spec in self.values())

    @property
    def parameters(self) -> int:
        return sum(matrix.parameters for matrix in self.matrices.values())

    @property
    def weight_bytes(self) -> int:
        return sum(matrix.weight_bytes for matrix in self.matrices.values())

    def fits(self, tp: int) -> bool:
        """Whether tp ranks can each own an equal part that needs nothing of the others but the sum of y, as
        the parts of a dense MLP do: at full speed.
        """
        # Dense matrices may be cut at any channel: only factors hold the channels of a group together.
        return (self.groups % tp == 0 if self.is_low_rank else True) and self.channels % tp == 0

    def gathers(self, tp: int) -> bool:
        """Whether tp ranks share one group's factors, at the price of two collectives more
        (models/gather.py). False where the layer fits. Raises UsageError where tp ranks cannot serve the
        layer at all.
        """
        if self.fits(tp):
            return False
        if self.groups == 1 and self.channels % tp == 0:
            return True
        raise UsageError(
            f"tensor parallel size {tp}: expected a size that serves this MLP ({self.sizes()}), found "
            f"another; choose one of those, or compress again with --tp {tp}."
        )

    def sizes(self) -> str:
        """Which tensor-parallel sizes serve the layer, in words."""
        if not self.is_low_rank:
            return f"any divisor of its {self.channels} channels"
        if self.groups == 1:
            return f"1, or slower any divisor of its {self.channels} channels"
        return ", ".join(map(str, divisors(self.groups))) + f" for its {self.groups} groups"

    def share(self, tp: int) -> MLPLayer:
        """What each of tp ranks owns of a layer that fits: a whole, smaller layer."""
        assert self.fits(tp), (self, tp)
        # Only a layer without factors comes here with groups that tp does not divide, and to it they mean
        # nothing.
        groups = self.groups // tp if self.groups % tp == 0 else 1
        return dataclasses.replace(self, channels=self.channels // tp, groups=groups)


def divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]


def full_speed_sizes(layers: Iterable[MLPLayer]) -> list[int]:
    """The tensor-parallel sizes that every layer fits."""
    # A size that divides every layer's units: groups, or single channels where no factor holds them together.
    return divisors(math.gcd(*(layer.groups if layer.is_low_rank else layer.channels for layer in layers)))
