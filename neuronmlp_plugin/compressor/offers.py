"""What each layer can become: at a few levels of channels removed, dealt into groups, the loss of every
rank. And one layer as it was chosen: the channels that stay in order of their groups, and every group's
factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from neuronmlp_plugin.calibration.workers import Workers
from neuronmlp_plugin.compressor.analyse import layer_name, metrics_of
from neuronmlp_plugin.compressor.job import ProgressBars, Workspace
from neuronmlp_plugin.compressor.origin import digest
from neuronmlp_plugin.compressor.plan import Plan
from neuronmlp_plugin.lowrank.allocate import Choice, Curve, Layer, Level, rank_for_share
from neuronmlp_plugin.lowrank.dealing import balanced, deal
from neuronmlp_plugin.lowrank.removal import eliminate, leverage_order
from neuronmlp_plugin.lowrank.slices import MLP, REFIT_GAIN, factor_inputs, factor_outputs
from neuronmlp_plugin.models.factors import PROJECTIONS

# A deal is made for slices that keep this share of their parameters, whatever size is asked for: it serves
# all sizes of an analysis.
NOMINAL_KEEP = 0.8


@dataclasses.dataclass(frozen=True)
class Offer:
    """Of one layer. `order [I]`: channels, the first to be kept first; `removal [I + 1]`: what keeping the
    first k loses; `tails[k] [3, ranks + 1]` of gate, up and down at a level of k channels, and `deals[k] [k]`
    the group of each of `kept(k)`.
    """

    order: torch.Tensor
    removal: torch.Tensor
    tails: dict[int, torch.Tensor]
    deals: dict[int, torch.Tensor]

    def kept(self, channels: int) -> torch.Tensor:
        """`[k]` in rising order."""
        return self.order[:channels].sort().values

    def groups(self, channels: int, count: int) -> list[torch.Tensor]:
        """Which of `kept(channels)` form each group."""
        dealt = self.deals.get(channels)
        if dealt is None:  # a level whose matrices stay dense: any order will do
            dealt = torch.arange(channels) * count // channels
        return [(dealt == group).nonzero()[:, 0] for group in range(count)]

    def to_tensors(self) -> dict[str, torch.Tensor]:
        named = {"tail": self.tails, "deal": self.deals}
        parts = {f"{name}.{k}": tensor for name, found in named.items() for k, tensor in found.items()}
        return {"order": self.order, "removal": self.removal, **parts}

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> Offer:
        def numbered(name: str) -> dict[int, torch.Tensor]:
            prefix = f"{name}."
            return {int(k.removeprefix(prefix)): t for k, t in tensors.items() if k.startswith(prefix)}

        return cls(tensors["order"], tensors["removal"], numbered("tail"), numbered("deal"))


def offer_name(plan: Plan, index: int) -> str:
    """Of a file in the analysis, whatever size it is for."""
    return f"offer-{digest([plan.groups, plan.levels, plan.factored_levels])[:8]}-{index:05d}"


def read_offer(plan: Plan, analysis: Workspace, index: int) -> Offer:
    return Offer.of(analysis.load(offer_name(plan, index)))


def read_mlp(plan: Plan, analysis: Workspace, index: int, device: torch.device) -> MLP:
    """A layer with its statistics; identities in the place of those that the method does not use."""
    saved, metrics = analysis.load(layer_name(index)), metrics_of(plan, analysis, index)
    weights = [plan.base.tensor(f"model.layers.{index}.mlp.{name}.weight") for name in PROJECTIONS]
    h, i = plan.shape.hidden_size, plan.shape.intermediate_size
    moments = [saved.get("inputs", torch.eye(h)), saved.get("channels", torch.eye(i))]
    ones = {"gate_proj": torch.ones(i), "up_proj": torch.ones(i), "down_proj": torch.eye(h)}
    return MLP(*weights, *moments, *(metrics.get(name, ones[name]) for name in PROJECTIONS)).to(device)


def make_offers(plan: Plan, analysis: Workspace, bars: ProgressBars, workers: Workers) -> None:
    """Bring the offer of every layer into the analysis, skipping what is there; each process has its share of
    the layers.
    """
    missing = [i for i in range(plan.shape.num_layers) if not analysis.has(offer_name(plan, i))]
    mine = missing[workers.index :: workers.count]
    with bars.stage("channels and ranks", len(mine)) as tick:
        for index in mine:
            offer = _offer(
                plan, read_mlp(plan, analysis, index, workers.device), _tokens(plan, analysis, index)
            )
            analysis.save(offer_name(plan, index), offer.to_tensors())
            tick(1)


def _tokens(plan: Plan, analysis: Workspace, index: int) -> int:
    return int(analysis.load(layer_name(index)).get("tokens", torch.tensor(1)))


def _offer(plan: Plan, mlp: MLP, tokens: int) -> Offer:
    least = min(plan.levels)
    if plan.settings.method == "modegpt":  # (sum of h h^T + 1)^-1, as published, for a mean over the tokens
        order, removal = leverage_order(mlp.channels, 1.0 / tokens).cpu(), torch.zeros(mlp.width + 1).double()
    elif least < mlp.width:
        order, removal = eliminate(mlp.down, mlp.channels, mlp.down_metric, least)
    else:
        order, removal = torch.arange(mlp.width), torch.zeros(mlp.width + 1, dtype=torch.float64)
    offer, whole = Offer(order, removal, {}, {}), torch.zeros(0)
    for channels in plan.factored_levels:
        ranks = _nominal_ranks(plan, channels)
        if channels == mlp.width:
            slim, dealt = mlp, deal(mlp.rows(), plan.groups, ranks)
            whole = dealt
        else:
            kept = offer.kept(channels).to(mlp.gate.device)
            slim = mlp.keep(kept)
            # The first level has all channels. Its deal serves the others: who stays keeps its group, as far
            # as the groups' sizes allow, where a deal for each level would take as long again.
            dealt = balanced(slim.rows(), whole[kept], plan.groups, ranks)
        groups = [(dealt == group).nonzero()[:, 0] for group in range(plan.groups)]
        offer.tails[channels], offer.deals[channels] = torch.stack(slim.tails(groups)), dealt.cpu()
    return offer


def _nominal_ranks(plan: Plan, channels: int) -> list[int]:
    part, h = channels // plan.groups, plan.shape.hidden_size
    rank = int(rank_for_share(NOMINAL_KEEP, h, part, plan.settings.form))
    return [min(rank, min(part, h) - 1)] * len(PROJECTIONS)


def read_layers(plan: Plan, analysis: Workspace) -> list[Layer]:
    """What the allocation chooses among, layer by layer."""
    return [_layer(plan, read_offer(plan, analysis, index)) for index in range(plan.shape.num_layers)]


def _layer(plan: Plan, offer: Offer) -> Layer:
    return [
        Level(channels, float(offer.removal[channels]), _curves(plan, channels, offer.tails.get(channels)))
        for channels in plan.levels
    ]


def _curves(plan: Plan, channels: int, tails: torch.Tensor | None) -> tuple[Curve, ...]:
    h, part, curves = plan.shape.hidden_size, channels // plan.groups, []
    for position, name in enumerate(PROJECTIONS):
        out, n_in = (h, part) if name == "down_proj" else (part, h)
        if tails is None:
            tail = np.append(np.full(min(h, part), np.inf), 0.0)  # dense, or not at all
        else:
            # Only parts that add up are fitted again together (`factor_inputs`).
            gain = REFIT_GAIN if name == "down_proj" and plan.groups > 1 else 0.0
            tail = tails[position].numpy() * (1.0 - gain)
        curves.append(Curve(out, n_in, tail, plan.groups))
    return tuple(curves)


def priced(layers: Sequence[Layer], prices: dict[int, dict[str, np.ndarray]]) -> list[Layer]:
    """The same layers with `prices[channels][projection]` in the place of parameters."""
    return [
        [
            dataclasses.replace(
                level,
                curves=tuple(
                    dataclasses.replace(curve, prices=prices[level.kept][name])
                    for curve, name in zip(level.curves, PROJECTIONS, strict=True)
                ),
            )
            for level in layer
        ]
        for layer in layers
    ]


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
    # Group after group, as it is stored. The second `keep` repairs nothing: the same channels in another
    # order.
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
    # Removed channels keep their whole columns in the error.
    error[:, found.channels.to(device)] -= found.low_rank("down_proj").to(device)
    losses.append(_energy(error, mlp.channels, mlp.down_metric))
    return dataclasses.replace(found, losses=torch.tensor(losses), energies=torch.tensor(energies))


def _energy(weight: torch.Tensor, moment: torch.Tensor, metric: torch.Tensor) -> float:
    """|| G^1/2 W C^1/2 ||^2."""
    w, g = weight.double(), metric.double()
    # tr(W^T G W C): no root of either is needed.
    spread = w @ moment.double()
    left = g[:, None] * w if g.ndim == 1 else g @ w
    return max(float((left * spread).sum()), 0.0)
