"""What each layer can become: at a few levels of channels removed, dealt into groups, the loss of every
rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from neuronmlp_plugin.calibration.workers import Workers
from neuronmlp_plugin.compressor.analyse import layer_name, metrics_of
from neuronmlp_plugin.compressor.plan import Plan, digest
from neuronmlp_plugin.compressor.progress import ProgressBars
from neuronmlp_plugin.compressor.workspace import Workspace
from neuronmlp_plugin.lowrank.allocate import Curve, Layer, Level, rank_for_share
from neuronmlp_plugin.lowrank.dealing import balanced, deal
from neuronmlp_plugin.lowrank.mlp import MLP
from neuronmlp_plugin.lowrank.removal import eliminate, leverage_order
from neuronmlp_plugin.lowrank.slices import REFIT_GAIN
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
        kept = offer.kept(channels).to(mlp.gate.device)
        slim = mlp.keep(kept)
        ranks = _nominal_ranks(plan, channels)
        if channels == mlp.width:
            dealt = whole = deal(slim.rows(), plan.groups, ranks)
        else:
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
