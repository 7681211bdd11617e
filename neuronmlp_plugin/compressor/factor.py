"""One layer as it was chosen: channels removed, the rest in order of their groups, and every group's
factors.
"""

from __future__ import annotations

import dataclasses

import torch

from neuronmlp_plugin.compressor.offers import Offer
from neuronmlp_plugin.lowrank.allocate import Choice
from neuronmlp_plugin.lowrank.dealing import deal
from neuronmlp_plugin.lowrank.mlp import MLP
from neuronmlp_plugin.lowrank.slices import factor_inputs, factor_outputs
from neuronmlp_plugin.models.factors import PROJECTIONS

Pair = tuple[torch.Tensor, torch.Tensor]  # first `[R, in]`, second `[out, R]` of one group
LATE_SWEEPS = 4  # of a deal that is nearly right
_METRIC = {"gate_proj": "gate_metric", "up_proj": "up_metric", "down_proj": "down_metric"}


@dataclasses.dataclass(frozen=True)
class FactoredLayer:
    """`channels [k]` of the base, group after group; `weights[projection]` of the k channels, before any rank
    (down repaired); `factors[projection]`, a pair for each group where it is not dense; `losses` of gate, up
    and down on the calibration moment, down's with that of the channels removed, of all that they put out
    (`energies`); `metrics` of their outputs.
    """

    channels: torch.Tensor
    weights: dict[str, torch.Tensor]
    factors: dict[str, list[Pair]]
    metrics: dict[str, torch.Tensor]
    losses: torch.Tensor
    energies: torch.Tensor

    def low_rank(self, projection: str) -> torch.Tensor:
        """W' `[out, in]` of the k channels."""
        pairs = self.factors.get(projection)
        if pairs is None:
            return self.weights[projection]
        parts = [second.double() @ first.double() for first, second in pairs]
        return torch.cat(parts, 1 if projection == "down_proj" else 0)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        parts = {"channels": self.channels, "losses": self.losses, "energies": self.energies}
        parts |= {f"{name}.weight": weight for name, weight in self.weights.items()}
        parts |= {f"{name}.metric": metric for name, metric in self.metrics.items()}
        for name, pairs in self.factors.items():
            firsts, seconds = zip(*pairs, strict=True)
            parts |= {f"{name}.first": torch.stack(firsts), f"{name}.second": torch.stack(seconds)}
        return parts

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> FactoredLayer:
        def named(part: str) -> dict[str, torch.Tensor]:
            return {name: tensors[f"{name}.{part}"] for name in PROJECTIONS if f"{name}.{part}" in tensors}

        seconds = named("second")
        factors = {n: list(zip(first, seconds[n], strict=True)) for n, first in named("first").items()}
        return cls(
            tensors["channels"],
            named("weight"),
            factors,
            named("metric"),
            tensors["losses"],
            tensors["energies"],
        )


def factor_layer(mlp: MLP, offer: Offer, choice: Choice, groups: int) -> FactoredLayer:
    """The layer that a choice stands for, on the CPU in fp32; the deal goes on from the offer's, for the
    ranks that were chosen.
    """
    kept = offer.kept(choice.kept).to(mlp.gate.device)
    slim = mlp.keep(kept)
    parts = [part.to(kept.device) for part in offer.groups(choice.kept, groups)]
    if groups > 1 and any(choice.ranks):
        parts = _dealt(slim, parts, choice)
    order = torch.cat(parts)
    slim, size = slim.keep(order), choice.kept // groups
    parts = [torch.arange(t * size, (t + 1) * size, device=kept.device) for t in range(groups)]
    weights = dict(zip(PROJECTIONS, (slim.gate, slim.up, slim.down), strict=True))
    metrics = {name: getattr(slim, field) for name, field in _METRIC.items()}
    factors = {}
    for name, rank in zip(PROJECTIONS, choice.ranks, strict=True):
        if rank is not None:
            moment, factor = (
                (slim.channels, factor_inputs) if name == "down_proj" else (slim.inputs, factor_outputs)
            )
            pairs = factor(weights[name], moment, metrics[name], parts, rank)
            factors[name] = [(first.float().cpu(), second.float().cpu()) for first, second in pairs]
    found = FactoredLayer(
        kept[order].cpu(),
        {name: weight.float().cpu() for name, weight in weights.items()},
        factors,
        {name: metric.cpu() for name, metric in metrics.items()},
        torch.zeros(3),
        torch.zeros(3),
    )
    return _with_losses(found, mlp, slim)


def _dealt(slim: MLP, parts: list[torch.Tensor], choice: Choice) -> list[torch.Tensor]:
    start = torch.empty(slim.width, dtype=torch.long, device=parts[0].device)
    for group, part in enumerate(parts):
        start[part] = group
    chosen = [position for position, rank in enumerate(choice.ranks) if rank is not None]
    ranks = [rank for rank in choice.ranks if rank is not None]
    dealt = deal(slim.rows()[chosen], len(parts), ranks, start, LATE_SWEEPS)
    return [(dealt == group).nonzero()[:, 0] for group in range(len(parts))]


def _with_losses(found: FactoredLayer, mlp: MLP, slim: MLP) -> FactoredLayer:
    """Exact, of the factors as they are."""
    device, losses, energies = mlp.gate.device, [], []
    for name, weight in (("gate_proj", slim.gate), ("up_proj", slim.up)):
        metric, low = found.metrics[name].to(device), found.low_rank(name).to(device)
        losses.append(_energy(weight - low, slim.inputs, metric))
        energies.append(_energy(weight, slim.inputs, metric))
    error = mlp.down.double().clone()
    energies.append(_energy(error, mlp.channels, mlp.down_metric))
    error[:, found.channels.to(device)] -= found.low_rank("down_proj").to(device)
    losses.append(_energy(error, mlp.channels, mlp.down_metric))
    return dataclasses.replace(found, losses=torch.tensor(losses), energies=torch.tensor(energies))


def _energy(weight: torch.Tensor, moment: torch.Tensor, metric: torch.Tensor) -> float:
    """|| G^1/2 W C^1/2 ||^2."""
    w, g = weight.double(), metric.double()
    spread = w @ moment.double()
    left = g[:, None] * w if g.ndim == 1 else g @ w
    return max(float((left * spread).sum()), 0.0)
