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
from neuronmlp_plugin.compressor import run as run_module
from neuronmlp_plugin.compressor.analyse import analyse, layer_name, load_decomposition
from neuronmlp_plugin.compressor.marginal import LIMIT, POWER, measured_gains, scaled
from neuronmlp_plugin.compressor.plan import make_plan
from neuronmlp_plugin.compressor.run import Run, compress
from neuronmlp_plugin.compressor.search import TruncatedStream
from neuronmlp_plugin.lowrank.allocate import Curve
from neuronmlp_plugin.models.factors import DENSE, PROJECTIONS, ProjectionSpec
from tests.compressor.test_compress import QUIET, files, home, settings_for  # noqa: F401 (home is a fixture)


def test_gains_are_the_gradient_of_kl_through_the_whole_truncated_model(home):  # noqa: F811
    plan, cpu = make_plan(settings_for(home, allocation="measured")), torch.device("cpu")
    run = Run(plan, cpu)
    analyse(plan, run.analysis, QUIET, Workers())
    chosen = [
        {name: ProjectionSpec("compact", 20) for name in PROJECTIONS} for _ in range(plan.shape.num_layers)
    ]
    chosen[1]["up_proj"] = DENSE
    gains = measured_gains(
        TruncatedStream(plan.base, run.analysis, chosen, cpu), plan.measured, run.work, QUIET
    )

    dense = load_model(home / "dense")
    truncated, changes = copy.deepcopy(dense).requires_grad_(False), []
    for index, layer in enumerate(truncated.model.layers):
        saved = run.analysis.load(layer_name(index))
        for name in PROJECTIONS:
            if chosen[index][name].rank is not None:
                found, weight = load_decomposition(saved, name), getattr(layer.mlp, name).weight
                exact, weight.data = weight.data, found.left[:, :20] @ found.right[:20]
                changes.append((weight.requires_grad_(), exact))
    windows = plan.measured
    with torch.no_grad():
        log_p = dense(windows).logits.log_softmax(-1)
    (log_p.exp() * (log_p - truncated(windows).logits.log_softmax(-1))).sum().backward()
    expected = [
        -float((weight.grad * (exact - weight.detach())).sum()) / windows.numel() for weight, exact in changes
    ]
    assert [gain is None for gain in gains] == [
        spec.rank is None for layer in chosen for spec in layer.values()
    ]
    assert [gain for gain in gains if gain is not None] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert not list(run.work.path.glob("measured-*"))


def test_curves_follow_what_was_measured_within_limits():
    curves = [Curve(4, 4, np.array([8.0, 4.0, 2.0, 1.0, 0.0])) for _ in range(4)]
    low, dear, cheap, dense = scaled(curves, [1, 1, 1, None], [4.0, 400.0, -1.0, None])
    assert low.tail.tolist() == (curves[0].tail * LIMIT**-POWER).tolist() == cheap.tail.tolist()
    assert dear.tail == pytest.approx(curves[0].tail * (400 / (403 / 3)) ** POWER)
    assert dense.tail.tolist() == curves[3].tail.tolist()
    assert scaled(curves, [1, 1, 1, None], [-1.0, -1.0, 1.0, None]) == curves  # no mean to compare with


def test_a_measured_allocation_keeps_its_budget_and_is_measured_once(home, monkeypatch):  # noqa: F811
    report = compress(make_plan(settings_for(home, allocation="measured")), QUIET)
    assert report["block"]["removed_ratio"] == pytest.approx(0.2, abs=0.005)

    def interrupted(*_):
        raise KeyboardInterrupt

    again = make_plan(settings_for(home, allocation="measured", out=home / "again"))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(again, QUIET)
    monkeypatch.setattr(run_module, "measured_gains", interrupted)
    assert compress(again, QUIET)["block"] == report["block"]


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
    curves = [Curve(8, 8, np.linspace(1.0, 0.0, 9) * height) for height in (0.0, 1.0, 1.0)]
    factors = [
        after.tail[0] / max(before.tail[0], 1e-9)
        for before, after in zip(curves, scaled(curves, [4, 4, 4], [1e-9, 1.0, 2.0]), strict=True)
    ]
    assert factors[0] == 0.0 and factors[1:] == pytest.approx([(2 / 3) ** POWER, (4 / 3) ** POWER])
