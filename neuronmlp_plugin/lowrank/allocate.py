"""Where to spend a budget: a rank for every matrix, or leave it dense.

Each matrix has a curve loss(k) (comparable across matrices, because of the output metric) and a cost(k): its
parameters, or any price that the caller puts on its ranks, such as simulated time. A dense matrix loses
nothing. Minimising the summed loss under a summed cost is a knapsack: Lagrange's mu is found by bisection,
and what is left of the budget is filled greedily by the upgrade with the most loss saved per unit of cost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from neuronmlp_plugin.errors import UsageError

FORMS = ("uv", "compact")
# Below this share of the break-even rank the summed loss stops predicting: errors of one matrix get too large
# to be additive.
MIN_RANK_SHARE = 0.35


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one matrix offers: `tail[k]` is the loss of rank k (`[min(out, in) + 1]`, fp64).

    `prices[k]`, of the same shape, is what rank k costs, and its last entry what the dense matrix costs; None
    counts parameters.
    """

    out_features: int
    in_features: int
    tail: np.ndarray
    prices: np.ndarray | None = None

    @property
    def dense_cost(self) -> float:
        return self.out_features * self.in_features if self.prices is None else float(self.prices[-1])

    def cost(self, rank: int | None, form: str) -> float:
        """Of a rank in a form, or of the dense matrix (None)."""
        if rank is None:
            return self.dense_cost
        return (
            cost(rank, self.in_features, self.out_features, form)
            if self.prices is None
            else float(self.prices[rank])
        )

    def loss(self, rank: int | None) -> float:
        """Of a rank; a dense matrix (None) has none."""
        return 0.0 if rank is None else float(self.tail[rank])


@dataclasses.dataclass(frozen=True)
class _Options:
    """Choices of one matrix worth making, in order of rising cost and falling loss; rank 0 stands for dense."""

    ranks: np.ndarray
    costs: np.ndarray
    losses: np.ndarray


def cost(rank: int, in_features: int, out_features: int, form: str) -> int:
    """Parameters of a rank in a form."""
    return rank * (in_features + out_features - (rank if form == "compact" else 0))


def rank_for_share(keep: float, in_features: int, out_features: int, form: str) -> float:
    """The (real-valued) rank at which a form costs `keep` times the dense matrix."""
    total, target = in_features + out_features, keep * in_features * out_features
    if form == "uv":
        return target / total
    return (total - math.sqrt(max(total * total - 4 * target, 0.0))) / 2


def uniform_ranks(curves: Sequence[Curve], keep: float, form: str, multiple: int) -> list[int | None]:
    """The same share of every matrix, rounded down to a multiple: the published baseline. Raises UsageError
    where that would be none.
    """
    ranks = [int(rank_for_share(keep, c.in_features, c.out_features, form) + 1e-9) for c in curves]
    if min(ranks) < multiple:
        raise UsageError(
            f"--rank-multiple {multiple}: expected at most the uniform rank, {min(ranks)}, found more; choose a smaller one."
        )
    return [rank // multiple * multiple for rank in ranks]


def check_removable(
    least: float, keep: float, form: str, multiple: int, what: str = "MLP parameters"
) -> None:
    """UsageError where `keep` is below `least`, both shares of the dense cost, of which `what` says the kind."""
    if least > keep:
        raise UsageError(
            f"size: expected at most {1 - least:.2f} of the {what} taken away at rank multiple {multiple}, form {form}, "
            f"found {1 - keep:.2f} asked for; ask for less, or for a smaller --rank-multiple."
        )


def most_removable(curves: Sequence[Curve], form: str, multiple: int) -> float:
    """The share of the dense cost that `allocate` can take away at most."""
    least = sum(float(_options(curve, form, multiple).costs[0]) for curve in curves)
    return 1 - least / sum(curve.dense_cost for curve in curves)


def allocate(curves: Sequence[Curve], keep: float, form: str, multiple: int) -> list[int | None]:
    """A rank for each matrix (None: dense) with the least summed loss whose cost is at most `keep` of the
    dense cost.

    Raises UsageError where no choice is cheap enough, or where the multiple is too coarse to come within 0.5
    % of a budget of parameters; the steps of a price are not the multiple's fault, so there what is left
    stays unspent.
    """
    options = [_options(curve, form, multiple) for curve in curves]
    dense_cost, has_prices = (
        sum(curve.dense_cost for curve in curves),
        any(curve.prices is not None for curve in curves),
    )
    what = "cost of the MLPs" if has_prices else "MLP parameters"
    budget = keep * dense_cost
    check_removable(sum(float(o.costs[0]) for o in options) / dense_cost, keep, form, multiple, what)
    picks = _fill(options, _pick(options, _bisect(options, budget)), budget)
    spent, all_dense = (
        _spent(options, picks),
        all(p + 1 == len(o.ranks) for o, p in zip(options, picks, strict=True)),
    )
    if not has_prices and not all_dense and budget - spent > 0.005 * dense_cost:
        raise UsageError(
            f"--rank-multiple {multiple}: expected to keep {keep:.4f} of the {what} within 0.5 %, found "
            f"{spent / dense_cost:.4f} at best; choose a smaller multiple."
        )
    return [int(o.ranks[p]) or None for o, p in zip(options, picks, strict=True)]


CHOOSERS = {
    "global": allocate,
    "measured": allocate,
    "uniform": uniform_ranks,
}  # "measured" scales the curves first


def _options(curve: Curve, form: str, multiple: int) -> _Options:
    m, n = curve.out_features, curve.in_features
    least = max(1, math.ceil(MIN_RANK_SHARE * m * n / (m + n) / multiple)) * multiple
    offered: list[tuple[float, float, int]] = [
        (curve.cost(k, form), curve.loss(k), k) for k in range(least, min(m, n), multiple)
    ]
    kept: list[tuple[float, float, int]] = []
    for option in sorted([*offered, (curve.dense_cost, 0.0, 0)]):
        if (
            not kept or option[1] < kept[-1][1]
        ):  # what costs as much and loses more is no choice: a staircase leaves its edges
            kept.append(option)
    costs, losses, ranks = zip(*kept, strict=True)
    return _Options(np.array(ranks), np.array(costs, dtype=float), np.array(losses))


def _pick(options: Sequence[_Options], mu: float) -> list[int]:
    return [int(np.argmin(o.losses + mu * o.costs)) for o in options]


def _spent(options: Sequence[_Options], picks: Sequence[int]) -> float:
    return sum(float(o.costs[p]) for o, p in zip(options, picks, strict=True))


def _bisect(options: Sequence[_Options], budget: float) -> float:
    """The smallest price per unit of cost at which the picks fit the budget."""
    low, high = 0.0, 1e-30
    while _spent(options, _pick(options, high)) > budget:
        high *= 4.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _spent(options, _pick(options, middle)) > budget else (low, middle)
    return high


def _fill(options: Sequence[_Options], picks: list[int], budget: float) -> list[int]:
    """Spend what is left: again and again the affordable upgrade that saves the most loss per unit of cost."""
    picks, room = list(picks), budget - _spent(options, picks)
    while True:
        best: tuple[float, int, int] | None = None
        for i, (o, p) in enumerate(zip(options, picks, strict=True)):
            extra, saved = o.costs[p + 1 :] - o.costs[p], o.losses[p] - o.losses[p + 1 :]
            worth = np.where((extra <= room) & (extra > 0), saved / np.where(extra > 0, extra, 1.0), -np.inf)
            if len(worth) and (best is None or worth.max() > best[0]):
                best = (float(worth.max()), i, p + 1 + int(worth.argmax()))
        if best is None or best[0] <= 0.0:
            return picks
        room -= float(options[best[1]].costs[best[2]] - options[best[1]].costs[picks[best[1]]])
        picks[best[1]] = best[2]
