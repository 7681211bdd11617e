"""A gated MLP with its statistics: what it loses in every rank, as it is or with channels removed; and its
matrices factorised group by group, down's second factors fitted again, all together.

W_down (silu(W_gate x) * W_up x), with I channels in the middle. Losses are those of `decompose`: comparable
across matrices and layers, and added up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from neuronmlp_plugin.lowrank.decompose import MetricRoots, decompose, eigen_roots, tail_of
from neuronmlp_plugin.lowrank.removal import repaired, ridged


@dataclasses.dataclass(frozen=True)
class MLP:
    """Weights `gate, up [I, H]`, `down [H, I]`; E[x x^T] of its input, `inputs [H, H]`, and of down's,
    `channels [I, I]`; the output metrics, `gate_metric, up_metric [I]` and `down_metric [H, H]`.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    inputs: torch.Tensor
    channels: torch.Tensor
    gate_metric: torch.Tensor
    up_metric: torch.Tensor
    down_metric: torch.Tensor

    @property
    def width(self) -> int:
        """I, or what is left of it."""
        return len(self.gate)

    def to(self, device: torch.device) -> MLP:
        return MLP(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    def keep(self, kept: torch.Tensor) -> MLP:
        """Only the channels `kept [k]`, in that order, with down repaired.

        A channel's gate and up matter as much as what down makes of it, and the repair makes more of those
        that stay, so their metrics grow with the energy of down's columns.
        """
        whole = len(kept) == self.width
        down = self.down[:, kept].double() if whole else repaired(self.down, self.channels, kept, self.passed)
        grown = _energies(down, self.down_metric) / self.energies[kept].clamp_min(1e-30)
        slim = MLP(
            self.gate[kept],
            self.up[kept],
            down,
            self.inputs,
            self.channels[kept][:, kept],
            self.gate_metric[kept] * grown,
            self.up_metric[kept] * grown,
            self.down_metric,
        )
        # What removal leaves as it is, and rows that only grow, where they are known. A cached_property keeps
        # its value in __dict__, which a frozen dataclass does not guard.
        known = vars(self)
        vars(slim).update({name: known[name] for name in ("input_root", "metric_root") if name in known})
        if "outputs" in known:
            vars(slim)["outputs"] = self.outputs[:, kept] * grown.sqrt().float()[:, None]
        return slim

    @functools.cached_property
    def input_root(self) -> torch.Tensor:
        """C_x^1/2 `[H, H]`."""
        return root(self.inputs)

    @functools.cached_property
    def metric_root(self) -> torch.Tensor:
        """G^1/2 of down `[H, H]`."""
        return root(self.down_metric)

    @functools.cached_property
    def passed(self) -> torch.Tensor:
        """Down times the moment of what goes into it, `[H, I]` fp64: what every repair begins with."""
        return self.down.double() @ self.channels.double()

    @functools.cached_property
    def energies(self) -> torch.Tensor:
        """d^T G d of every column of down `[I]`."""
        return _energies(self.down, self.down_metric)

    @functools.cached_property
    def weighted(self) -> torch.Tensor:
        """G^1/2 times down `[H, I]` fp64."""
        return self.metric_root @ self.down.double()

    @functools.cached_property
    def outputs(self) -> torch.Tensor:
        """`[2, I, H]` fp32: the whitened rows of gate and up, G^1/2 W C_x^1/2."""
        sides = ((self.gate, self.gate_metric), (self.up, self.up_metric))
        found = [metric.double().sqrt()[:, None] * (w.double() @ self.input_root) for w, metric in sides]
        return torch.stack(found).float()

    def rows(self) -> torch.Tensor:
        """`[3, I, H]` fp32: `outputs`, and the columns of `weighted`, each as long as what it carries: what
        `deal` is about.
        """
        # The diagonal alone: which correlations count depends on the groups, and those are being looked for.
        scale = self.channels.diagonal().double().clamp_min(0.0).sqrt()
        return torch.cat((self.outputs, (self.weighted * scale).T.float()[None]))

    def tails(self, groups: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For gate, up and down: `tail[R] [min(n, H) + 1]` (fp64), the loss of rank R in every group's slice.

        `groups`: the channels `[n]` of each.
        """
        spectra = [[_spectrum(matrix[group].double()) for group in groups] for matrix in self.outputs]
        spectra.append([])
        for group in groups:
            # Any S with S S^T = C gives W S the same singular values; a Cholesky factor is the cheapest.
            spread = torch.linalg.cholesky(ridged(self.channels[group][:, group]))
            spectra[2].append(_spectrum((self.weighted[:, group] @ spread).T))
        # One rank serves every group of a matrix (FORMAT.md), so their losses at a rank add up.
        return [tail_of(torch.stack(slices).sum(0)).cpu() for slices in spectra]


def root(symmetric: torch.Tensor) -> torch.Tensor:
    """The positive square root of a ridged, symmetric matrix, fp64."""
    vectors, roots = eigen_roots(symmetric)
    return (vectors * roots) @ vectors.T


def _energies(down: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """d^T G d of every column of down."""
    columns = down.double()
    return (columns * (metric.double() @ columns)).sum(0)


def _spectrum(rows: torch.Tensor) -> torch.Tensor:
    """Squared singular values, descending."""
    # The smaller of the two: beyond min(rows, columns) all values are 0.
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)


Pair = tuple[torch.Tensor, torch.Tensor]  # of one group: (first [R, in], second [out, R])
# What `refit` takes off the loss of down's slices, roughly: 19 to 25 % and a sweep 3 to 4 % more. Assumed in
# the curves, so that ranks are chosen with it.
REFIT_GAIN = 0.22
REFIT_RIDGE = 1e-8


def factor_outputs(
    weight: torch.Tensor,
    moment: torch.Tensor,
    metric: torch.Tensor,
    groups: Sequence[torch.Tensor],
    rank: int,
) -> list[Pair]:
    """Gate or up `[I, H]`: the best rank of each group's rows. A matrix of rank 2 whose two groups are of
    rank 1 each, which costs less and loses nothing:

    >>> weight = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 0.0]])
    >>> pairs = factor_outputs(weight, torch.eye(2), torch.ones(3), [torch.arange(2), torch.tensor([2])], 1)
    >>> bool(torch.allclose(torch.cat([v @ u for u, v in pairs]).float(), weight))
    True
    """
    return [decompose(weight[group], moment, metric[group]).truncate(rank) for group in groups]


def factor_inputs(
    weight: torch.Tensor,
    moment: torch.Tensor,
    metric: torch.Tensor,
    groups: Sequence[torch.Tensor],
    rank: int,
) -> list[Pair]:
    """Down `[H, I]` under C `[I, I]`: the best rank of each group's columns, then a refit, one sweep, a
    refit.

    The groups' parts add up to the output, so their errors interact: the second factors that are best
    together are not the best of each.
    """
    roots = MetricRoots.of(metric, weight)
    pairs = [decompose(weight[:, group], moment[group][:, group], roots).truncate(rank) for group in groups]
    # Nothing to interact with: the truncated SVD is the best there is.
    if len(groups) == 1:
        return pairs
    pairs = _refitted(weight, moment, groups, pairs)
    return _refitted(weight, moment, groups, _swept(weight, moment, roots, groups, pairs))


def _refitted(
    weight: torch.Tensor, moment: torch.Tensor, groups: Sequence[torch.Tensor], pairs: Sequence[Pair]
) -> list[Pair]:
    """With all first factors U as they are (block-diagonal), V = W C U^T (U C U^T)^-1 has the least loss
    under any metric.
    """
    c, ranks = moment.double(), [len(first) for first, _ in pairs]
    # C U^T [I, g R], and below U C U^T [g R, g R]: U is block-diagonal, so a group's rows of it meet its own
    # channels alone.
    spread = torch.cat(
        [c[:, group] @ first.double().T for group, (first, _) in zip(groups, pairs, strict=True)], 1
    )
    gram = torch.cat(
        [first.double() @ spread[group] for group, (first, _) in zip(groups, pairs, strict=True)]
    )
    cross = weight.double() @ spread
    second = torch.cholesky_solve(cross.T, torch.linalg.cholesky(ridged(gram, REFIT_RIDGE))).T
    return [(first, part) for (first, _), part in zip(pairs, second.split(ranks, 1), strict=True)]


def _swept(
    weight: torch.Tensor,
    moment: torch.Tensor,
    roots: MetricRoots,
    groups: Sequence[torch.Tensor],
    pairs: Sequence[Pair],
) -> list[Pair]:
    """Group after group, the best rank for what the others leave: a reduced-rank regression on its
    channels.
    """
    found, left = list(pairs), weight.double().clone()
    for group, (first, second) in zip(groups, pairs, strict=True):
        left[:, group] -= second.double() @ first.double()
    for index, group in enumerate(groups):
        first, second = found[index]
        # What the others leave: the group's own part is put back, and fitted anew.
        left[:, group] += second.double() @ first.double()
        # Of all that is left, columns outside the group too, its channels can stand for as much as they
        # correlate with it: left C[:, S] C[S, S]^-1.
        own = ridged(moment[group][:, group])
        fitted = torch.cholesky_solve((left @ moment[:, group].double()).T, torch.linalg.cholesky(own)).T
        found[index] = first, second = decompose(fitted, own, roots).truncate(len(first))
        left[:, group] -= second.double() @ first.double()
    return found
