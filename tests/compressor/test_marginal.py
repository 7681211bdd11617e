"""`--allocation measured`: the gains are the gradient's, and the curves follow them within limits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from neuronmlp_plugin.calibration.workers import Workers
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.cli import build_parser
from neuronmlp_plugin.commands.compress import settings_of
from neuronmlp_plugin.compressor import pipeline as run_module
from neuronmlp_plugin.compressor.analyse import analyse
from neuronmlp_plugin.compressor.marginal import LIMIT, POWER, measured_gains, placed, scaled
from neuronmlp_plugin.compressor.offers import make_offers
from neuronmlp_plugin.compressor.pipeline import Run, compress
from neuronmlp_plugin.compressor.plan import make_plan
from neuronmlp_plugin.lowrank.allocate import Choice, Curve, Level
from neuronmlp_plugin.models.factors import PROJECTIONS
from tests.compressor.test_compress import QUIET, files, home, settings_for  # noqa: F401 (home is a fixture)


def test_gains_are_the_gradient_of_kl_through_the_whole_truncated_model(home):  # noqa: F811
    plan, cpu = make_plan(settings_for(home, allocation="measured")), torch.device("cpu")
    run = Run(plan, cpu)
    analyse(plan, run.analysis, QUIET, Workers())
    make_offers(plan, run.analysis, QUIET, Workers())
    choices = [Choice(192, (40, None, 40)), Choice(160, (None, 30, 30)), Choice(128, (None, None, None))]
    gains = measured_gains(run.factor(choices, QUIET), plan.measured, run.work, QUIET)

    dense = load_model(home / "dense")
    truncated, changes = copy.deepcopy(dense).requires_grad_(False), []
    for index, layer in enumerate(truncated.model.layers):
        found = run.factored(index, choices[index])
        for name in PROJECTIONS:
            weight = getattr(layer.mlp, name).weight
            exact = weight.data.clone()
            before, after = (
                placed(found, w, name, exact) for w in (found.weights[name], found.low_rank(name))
            )
            weight.data = after
            changes.append((weight.requires_grad_(), exact, before))
    windows = plan.measured
    with torch.no_grad():
        log_p = dense(windows).logits.log_softmax(-1)
    (log_p.exp() * (log_p - truncated(windows).logits.log_softmax(-1))).sum().backward()

    def worth(weight, change) -> float:
        return -float((weight.grad * change).sum()) / windows.numel()

    for index, choice in enumerate(choices):
        mine = changes[3 * index : 3 * index + 3]
        weight, exact, before = mine[2]
        expected = [None if choice.kept == 192 else worth(weight, exact - before)]
        for rank, (weight, _, before) in zip(choice.ranks, mine, strict=True):
            expected.append(None if rank is None else worth(weight, before - weight.detach()))
        assert [gain is None for gain in gains[index]] == [gain is None for gain in expected]
        known = [gain for gain in expected if gain is not None]
        assert [g for g in gains[index] if g is not None] == pytest.approx(known, rel=1e-3, abs=1e-7)
    assert not list(run.work.path.glob("measured-*"))


def test_removed_channels_have_no_part_in_what_a_truncated_model_puts_out(home):  # noqa: F811
    plan, cpu = make_plan(settings_for(home)), torch.device("cpu")
    run = Run(plan, cpu)
    analyse(plan, run.analysis, QUIET, Workers())
    make_offers(plan, run.analysis, QUIET, Workers())
    layer = run.factor([Choice(96, (None,) * 3)] * 3, QUIET).load(1)
    gone = layer.mlp.down_proj.weight.abs().sum(0) == 0
    assert int(gone.sum()) == 96
    dense = load_model(home / "dense").model.layers[1].mlp
    assert torch.equal(layer.mlp.gate_proj.weight, dense.gate_proj.weight)
    assert torch.equal(layer.mlp.up_proj.weight[gone], dense.up_proj.weight[gone])


def single(curve: Curve) -> list[Level]:
    """A layer of one matrix, at one level and at another with some channels removed."""
    return [Level(4, 0.0, (curve,)), Level(3, 2.0, (curve,))]


def test_losses_follow_what_was_measured_within_limits():
    curve = Curve(4, 4, np.array([8.0, 4.0, 2.0, 1.0, 0.0]))
    choices = [*[Choice(4, (1,))] * 3, Choice(3, (None,))]
    gains = [[None, 4.0], [None, 400.0], [None, -1.0], [2.0, None]]
    low, dear, cheap, narrow = scaled([single(curve)] * 4, choices, gains)
    mean = (4 / 4 + 400 / 4 - 1 / 4 + 2 / 2) / 4
    assert (
        low[0].curves[0].tail.tolist()
        == (curve.tail * LIMIT**-POWER).tolist()
        == cheap[0].curves[0].tail.tolist()
    )
    assert dear[0].curves[0].tail == pytest.approx(curve.tail * min(100 / mean, LIMIT) ** POWER)
    assert narrow[1].removal == pytest.approx(2.0 * LIMIT**-POWER)
    layers = [single(curve)] * 3
    assert (
        scaled(layers, choices[:3], [[None, -1.0], [None, -1.0], [None, 1.0]]) == layers
    )  # no mean to compare with


def test_what_was_not_measured_goes_by_its_layer_and_its_neighbours():
    curve = Curve(4, 4, np.array([8.0, 4.0, 2.0, 1.0, 0.0]))
    choices = [Choice(4, (1,)), Choice(4, (None,)), Choice(4, (1,))]
    first, between, last = scaled([single(curve)] * 3, choices, [[None, 4.0], [None, None], [None, 12.0]])
    assert first[1].removal == pytest.approx(2.0 * 0.5**POWER) and last[1].removal == pytest.approx(
        2.0 * 1.5**POWER
    )
    assert between[1].removal == pytest.approx(2.0) and between[0].curves[0].tail == pytest.approx(curve.tail)


def test_a_measured_allocation_keeps_its_budget_and_is_measured_once(home, monkeypatch):  # noqa: F811
    report = compress(make_plan(settings_for(home, allocation="measured")), QUIET)
    assert report.block["removed_ratio"] == pytest.approx(0.2, abs=0.005)

    def interrupted(*_):
        raise KeyboardInterrupt

    again = make_plan(settings_for(home, allocation="measured", out=home / "again"))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(again, QUIET)
    monkeypatch.setattr(run_module, "measured_gains", interrupted)
    assert compress(again, QUIET).block == report.block


@pytest.mark.parametrize(
    ("options", "allocation"),
    [
        ("--remove 0.2", "measured"),
        ("--keep 0.8", "measured"),
        ("--remove 0.2 --allocation global", "global"),
        ("--target kl<0.1", "global"),
        ("--faster 1.1", "measured"),
        ("--remove 0.2 --method whitened", "uniform"),
        ("--remove 0.2 --method plain", "uniform"),
    ],
)
def test_ranks_are_chosen_by_measurement_unless_told_otherwise(options, allocation):
    args = build_parser().parse_args(
        ["compress", "MODEL", "--out", "DIR", "--text", "text.txt", *options.split()]
    )
    assert settings_of(args).allocation == allocation


def test_a_matrix_that_loses_nothing_does_not_decide_for_the_others():
    layers = [single(Curve(8, 8, np.linspace(1.0, 0.0, 9) * height)) for height in (0.0, 1.0, 1.0)]
    after = scaled(layers, [Choice(4, (4,))] * 3, [[None, 1e-9], [None, 1.0], [None, 2.0]])
    factors = [float(layer[0].curves[0].tail[0]) for layer in after]
    assert factors[0] == 0.0 and factors[1:] == pytest.approx([(2 / 3) ** POWER, (4 / 3) ** POWER])
