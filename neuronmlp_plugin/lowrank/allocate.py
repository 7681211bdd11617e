"""Where to spend a budget: for every layer the channels that it keeps, and a rank for each matrix or none.

A layer offers levels, each with some channels removed; at a level each matrix has a curve loss(k), comparable
across matrices because of the output metric, and a cost(k): its parameters, or any price that the caller puts
on its ranks, such as simulated time. Losses add up: exactly for channels removed and down's rank, and nearly
for the rest. Minimising the summed loss under a summed cost is a knapsack: Lagrange's mu is found by
bisection, and what is left of the budget is filled greedily by the upgrade with the most loss saved per unit
of cost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from neuronmlp_plugin.errors import UsageError

T = TypeVar("T")
FORMS = ("uv", "compact", "narrow")  # narrow: channels go, and matrices stay dense
# Below this share of the break-even rank the summed loss stops predicting: errors of one matrix get too large
# to be additive.
MIN_RANK_SHARE = 0.35


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one matrix offers in `groups` slices `[out, in]`, all of one rank: `tail[k]` is the loss of rank k
    (`[min(out, in) + 1]`, fp64).

    `prices[k]`, of the same shape, is what rank k costs, and its last entry what the dense matrix costs; None
    counts parameters.
    """

    out_features: int
    in_features: int
    tail: np.ndarray
    groups: int = 1
    prices: np.ndarray | None = None

    @property
    def dense_cost(self) -> float:
        parameters = self.groups * self.out_features * self.in_features
        return parameters if self.prices is None else float(self.prices[-1])

    def cost(self, rank: int | None, form: str) -> float:
        """Of a rank in a form, or of the dense matrix (None)."""
        if rank is None:
            return self.dense_cost
        if self.prices is not None:
            return float(self.prices[rank])
        return self.groups * cost(rank, self.in_features, self.out_features, form)

    def loss(self, rank: int | None) -> float:
        """Of a rank; a dense matrix (None) has none."""
        return 0.0 if rank is None else float(self.tail[rank])


@dataclasses.dataclass(frozen=True)
class Level:
    """A layer with `kept` channels, whose removal loses `removal`; what its gate, up and down then offer."""

    kept: int
    removal: float
    curves: tuple[Curve, ...]

    @property
    def dense_cost(self) -> float:
        return sum(curve.dense_cost for curve in self.curves)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a layer becomes: channels kept, and the rank of each matrix in every group (None: dense)."""

    kept: int
    ranks: tuple[int | None, ...]


Layer = Sequence[Level]  # the first has all channels


@dataclasses.dataclass(frozen=True)
class _Options:
    """Choices of one layer worth making, in order of rising cost and falling loss."""

    choices: list[Choice]
    costs: np.ndarray
    losses: np.ndarray


def cost(rank: int, in_features: int, out_features: int, form: str) -> int:
    """Parameters of a rank in a form: compact stores no pivots' rows, so it is cheaper at every rank, and at
    full rank (here 6) costs what the dense 48 do.

    >>> [(cost(rank, 8, 6, "uv"), cost(rank, 8, 6, "compact")) for rank in (2, 6)]
    [(28, 24), (84, 48)]
    """
    return rank * (in_features + out_features - (rank if form == "compact" else 0))


def rank_for_share(keep: float, in_features: int, out_features: int, form: str) -> float:
    """The (real-valued) rank at which a form costs `keep` times the dense matrix."""
    total, target = in_features + out_features, keep * in_features * out_features
    if form == "uv":
        return target / total
    # compact: R (total - R) = target has two roots, and a rank is the smaller. Of a square matrix kept whole
    # they are one, and rounding may take the difference below 0.
    return (total - math.sqrt(max(total * total - 4 * target, 0.0))) / 2


def uniform(layers: Sequence[Layer], keep: float, form: str, multiple: int) -> list[Choice]:
    """The same share of every matrix, rounded down to a multiple, or as many channels of every layer: the
    published baselines. Raises UsageError where that would be none.
    """
    if form == "narrow":
        return [_narrow(layer, keep) for layer in layers]
    curves = [curve for layer in layers for curve in layer[0].curves]
    # A budget that is exactly 64 ranks may come out as 63.999...: not a rank lost to that.
    ranks = [int(rank_for_share(keep, c.in_features, c.out_features, form) + 1e-9) for c in curves]
    if min(ranks) < multiple:
        raise UsageError(
            f"--rank-multiple {multiple}: expected at most the uniform rank, {min(ranks)}, found more; "
            "choose a smaller one."
        )
    rounded = iter(rank // multiple * multiple for rank in ranks)
    return [Choice(layer[0].kept, tuple(next(rounded) for _ in layer[0].curves)) for layer in layers]


def _narrow(layer: Layer, keep: float) -> Choice:
    fitting = [level for level in layer if level.kept <= keep * layer[0].kept]
    if not fitting:
        raise UsageError(
            f"size: expected at most {1 - layer[-1].kept / layer[0].kept:.2f} of the channels taken away, "
            f"found {1 - keep:.4g} asked for; "
            "ask for less."
        )
    return Choice(max(level.kept for level in fitting), (None,) * len(layer[0].curves))


def check_removable(
    least: float, keep: float, form: str, multiple: int, what: str = "MLP parameters"
) -> None:
    """UsageError where `keep` is below `least`, both shares of the dense cost, of which `what` says the
    kind.
    """
    if least > keep:
        raise UsageError(
            f"size: expected at most {1 - least:.2f} of the {what} taken away at rank multiple {multiple}, "
            f"form {form}, found {1 - keep:.4g} asked for; ask for less, or for a smaller --rank-multiple."
        )


def most_removable(layers: Sequence[Layer], form: str, multiple: int) -> float:
    """The share of the dense cost that `allocate` can take away at most."""
    least = sum(float(_options(layer, form, multiple).costs[0]) for layer in layers)
    return 1 - least / sum(layer[0].dense_cost for layer in layers)


def loss(layers: Sequence[Layer], choices: Sequence[Choice]) -> float:
    """The summed loss that is predicted for the choices."""
    return sum(sum(parts(layer, choice)) for layer, choice in zip(layers, choices, strict=True))


def parts(layer: Layer, choice: Choice) -> list[float]:
    """The losses predicted for one layer: of its channels removed, then of each matrix's rank."""
    level = next(level for level in layer if level.kept == choice.kept)
    return [level.removal, *(c.loss(rank) for c, rank in zip(level.curves, choice.ranks, strict=True))]


def allocate(layers: Sequence[Layer], keep: float, form: str, multiple: int) -> list[Choice]:
    """A choice for each layer with the least summed loss whose cost is at most `keep` of the dense cost.

    Raises UsageError where no choice is cheap enough, or where the multiple is too coarse to come within 0.5
    % of a budget of parameters; the steps of a price, or of channels, are not the multiple's fault, so there
    what is left stays unspent.
    """
    options = [_options(layer, form, multiple) for layer in layers]
    dense_cost = sum(layer[0].dense_cost for layer in layers)
    has_prices = any(curve.prices is not None for layer in layers for curve in layer[0].curves)
    what = "cost of the MLPs" if has_prices else "MLP parameters"
    budget = keep * dense_cost
    check_removable(sum(float(o.costs[0]) for o in options) / dense_cost, keep, form, multiple, what)
    # A price alone jumps over budgets: between two prices whole layers move at once, which leaves a rest to
    # fill.
    picks = _fill(options, _pick(options, _bisect(options, budget)), budget)
    spent = _spent(options, picks)
    all_dense = all(p + 1 == len(o.costs) for o, p in zip(options, picks, strict=True))
    # A budget is met within 0.5 % by ranks alone: channels go many at a time, which is coarse in a small
    # model.
    exact = not has_prices and all(len(layer) == 1 for layer in layers)
    if exact and not all_dense and budget - spent > 0.005 * dense_cost:
        raise UsageError(
            f"--rank-multiple {multiple}: expected to keep {keep:.4f} of the {what} within 0.5 %, found "
            f"{spent / dense_cost:.4f} at best; choose a smaller multiple."
        )
    return [o.choices[p] for o, p in zip(options, picks, strict=True)]


# "measured" scales the curves first.
CHOOSERS = {"global": allocate, "measured": allocate, "uniform": uniform}


def _options(layer: Layer, form: str, multiple: int) -> _Options:
    offered = [option for level in layer for option in _of_level(level, form, multiple)]
    costs, losses, choices = zip(*_worthwhile(offered), strict=True)
    return _Options(list(choices), np.array(costs, dtype=float), np.array(losses))


def _worthwhile(options: Iterable[tuple[float, float, T]]) -> list[tuple[float, float, T]]:
    """`(cost, loss, what)` in order of rising cost and falling loss: what costs as much and loses more is no
    choice, so that a staircase leaves its edges.
    """
    kept: list[tuple[float, float, T]] = []
    for option in sorted(options, key=lambda option: option[:2]):
        if not kept or option[1] < kept[-1][1]:
            kept.append(option)
    return kept


def _of_level(level: Level, form: str, multiple: int) -> list[tuple[float, float, Choice]]:
    """From the cheapest ranks of a level to its dense matrices: along each matrix's lower convex hull, where
    the next step is the one of all matrices that saves the most loss per unit of cost, and on the way to it
    what lies between: `(cost, loss, choice)` each.
    """
    options = [_of_matrix(curve, form, multiple) for curve in level.curves]
    # Costs and losses are sums over the matrices, so the lower hull of the level is the steps of their hulls,
    # the steepest first.
    hulls = [_hull(matrix) for matrix in options]
    at = [0] * len(options)  # of each matrix, the place in its options
    found = [_together(level, options, at)]
    while any(hulls):
        slopes = [
            # -1: this matrix has no step left, and every real one saves something
            _saved(matrix[i], matrix[hull[0]]) if hull else -1.0
            for matrix, hull, i in zip(options, hulls, at, strict=True)
        ]
        best = int(np.argmax(slopes))
        edge = hulls[best].pop(0)
        # No price picks what lies between two edges of a hull, but `_fill` can afford it with what is left.
        while at[best] < edge:
            at[best] += 1
            found.append(_together(level, options, at))
    return found


def _together(
    level: Level, options: list[list[tuple[float, float, int]]], at: list[int]
) -> tuple[float, float, Choice]:
    picked = [matrix[i] for matrix, i in zip(options, at, strict=True)]
    ranks = tuple(rank or None for _, _, rank in picked)
    return sum(p[0] for p in picked), level.removal + sum(p[1] for p in picked), Choice(level.kept, ranks)


def _of_matrix(curve: Curve, form: str, multiple: int) -> list[tuple[float, float, int]]:
    """`(cost, loss, rank)` of every rank worth offering; rank 0 stands for dense."""
    m, n = curve.out_features, curve.in_features
    least = max(1, math.ceil(MIN_RANK_SHARE * m * n / (m + n) / multiple)) * multiple
    # Without full rank, which no form stores in less than the dense matrix; and without losses of inf, which
    # stand for a level whose matrices stay dense.
    ranks = range(least, min(m, n), multiple) if form != "narrow" else ()
    offered = [(curve.cost(k, form), curve.loss(k), k) for k in ranks if np.isfinite(curve.loss(k))]
    return _worthwhile([*offered, (curve.dense_cost, 0.0, 0)])


def _hull(options: list[tuple[float, float, int]]) -> list[int]:
    """Places of the lower convex hull after the first: along it every step saves less per unit of cost than
    the one before.
    """
    hull: list[int] = []
    for place, option in enumerate(options):
        while len(hull) > 1 and _saved(options[hull[-1]], option) >= _saved(
            options[hull[-2]], options[hull[-1]]
        ):
            hull.pop()
        hull.append(place)
    return hull[1:]


def _saved(before: tuple[float, float, int], after: tuple[float, float, int]) -> float:
    return (before[1] - after[1]) / (after[0] - before[0])


def _pick(options: Sequence[_Options], mu: float) -> list[int]:
    # At one price all layers decide for themselves: that is what makes the knapsack separable.
    return [int(np.argmin(o.losses + mu * o.costs)) for o in options]


def _spent(options: Sequence[_Options], picks: Sequence[int]) -> float:
    return sum(float(o.costs[p]) for o, p in zip(options, picks, strict=True))


def _bisect(options: Sequence[_Options], budget: float) -> float:
    """The smallest price per unit of cost at which the picks fit the budget."""
    low, high = 0.0, 1e-30  # the picks at `high` fit from the loop below on, and stay so
    # Ends: `check_removable` has seen that the cheapest choices fit.
    while _spent(options, _pick(options, high)) > budget:
        high *= 4.0
    # Beyond what fp64 tells apart, at any scale of the losses.
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _spent(options, _pick(options, middle)) > budget else (low, middle)
    return high


def _fill(options: Sequence[_Options], picks: list[int], budget: float) -> list[int]:
    """Spend what is left: again and again the affordable upgrade that saves the most loss per unit of
    cost.
    """
    picks, room = list(picks), budget - _spent(options, picks)
    while True:
        best: tuple[float, int, int] | None = None
        for i, (o, p) in enumerate(zip(options, picks, strict=True)):
            # All that follow, not the next alone: between the edges of a hull a longer step may save more per
            # unit.
            extra, saved = o.costs[p + 1 :] - o.costs[p], o.losses[p] - o.losses[p + 1 :]
            worth = np.where(extra <= room, saved / extra, -np.inf)  # options rise in cost: `_worthwhile`
            if len(worth) and (best is None or worth.max() > best[0]):
                best = (float(worth.max()), i, p + 1 + int(worth.argmax()))
        if best is None or best[0] <= 0.0:
            return picks
        room -= float(options[best[1]].costs[best[2]] - options[best[1]].costs[picks[best[1]]])
        picks[best[1]] = best[2]
