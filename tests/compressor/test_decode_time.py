"""Ranks priced by simulated decode time: what the prices are, and what a knapsack does with them."""

from __future__ import annotations

import numpy as np
import pytest

from neuronmlp_plugin.compressor.decode_time import level_prices, model_us, priced_ranks, rank_prices
from neuronmlp_plugin.compressor.offers import priced
from neuronmlp_plugin.compressor.pipeline import compress
from neuronmlp_plugin.compressor.plan import make_plan
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.lowrank.allocate import Curve, Level, allocate, loss
from neuronmlp_plugin.models.factors import DENSE, PROJECTIONS, MLPLayer, MLPShape, ProjectionSpec
from tests import tiny_models
from tests.compressor.test_compress import QUIET, home, settings_for  # noqa: F401 (home is a fixture)
from tests.letters import write_text, write_tokenizer
from tests.lowrank.test_allocate import curve, layer_cost

SHAPE = MLPShape(512, 1024, 4)
LLAMA_1B = MLPShape(2048, 8192, 16)


@pytest.fixture(scope="module")
def prices() -> dict[str, np.ndarray]:
    return rank_prices(SHAPE.hidden_size, SHAPE.intermediate_size, "uv")


def us(shape: MLPShape, specs: dict[str, ProjectionSpec]) -> float:
    """Simulated us of one layer."""
    return model_us([MLPLayer.of(shape, specs)])


def layers_of(shape: MLPShape) -> list[list[Level]]:
    """Layers of all their channels."""
    found, kind = [], 0
    for _ in range(shape.num_layers):
        curves: list[Curve] = []
        for name in PROJECTIONS:
            curves.append(curve(*shape.in_out(name)[::-1], 0.002 * (1 + kind % 5), 1.0 + 2 * (kind % 3)))
            kind += 1
        found.append([Level(shape.intermediate_size, 0.0, tuple(curves))])
    return found


def cost(layers, choices) -> float:
    return sum(layer_cost(layer, choice, "uv") for layer, choice in zip(layers, choices, strict=True))


def ranks_of(choices) -> list[int]:
    return [rank for choice in choices for rank in choice.ranks if rank is not None]


def test_prices_rise_by_row_tiles(prices):
    for name in PROJECTIONS:
        step = np.diff(prices[name][:-1])
        # The median: half a tile on there is an edge of its own, where a block is no longer shared.
        inside, across = np.median(step[256 : 256 + 126]), prices[name][257] - prices[name][256]
        assert across > 5 * abs(inside), name


def test_the_sum_of_prices_is_near_the_time_of_the_launch(prices):
    """Within 15 % where a launch takes 12 us, much of it latency; real sizes below."""
    made = {
        "gate_proj": ProjectionSpec("uv", 256),
        "up_proj": ProjectionSpec("uv", 128),
        "down_proj": ProjectionSpec("uv", 256),
    }
    summed = sum(float(prices[name][spec.rank]) for name, spec in made.items())
    assert summed == pytest.approx(us(SHAPE, made), rel=0.15)
    assert sum(float(prices[name][-1]) for name in PROJECTIONS) == pytest.approx(
        us(SHAPE, dict.fromkeys(PROJECTIONS, DENSE))
    )


def one_low(name: str, form: str, rank: int) -> float:
    """Simulated us of a Llama-3.2-1B MLP with one low-rank projection."""
    return us(LLAMA_1B, {**dict.fromkeys(PROJECTIONS, DENSE), name: ProjectionSpec(form, rank)})


@pytest.mark.parametrize(("first", "last"), [(1153, 1216), (1217, 1280)])
@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_between_the_ends_of_half_a_tile_time_is_a_straight_line(name, first, last):
    middle = (first + last) // 2
    assert one_low(name, "uv", middle) == pytest.approx(
        (one_low(name, "uv", first) + one_low(name, "uv", last)) / 2, rel=0.002
    )


def test_on_real_sizes_the_sum_of_prices_is_the_launch_within_half_a_percent():
    dense = us(LLAMA_1B, dict.fromkeys(PROJECTIONS, DENSE))
    summed = 2 * one_low("gate_proj", "uv", 1280) + one_low("down_proj", "uv", 1280) - 2 * dense
    assert summed == pytest.approx(
        us(LLAMA_1B, dict.fromkeys(PROJECTIONS, ProjectionSpec("uv", 1280))), rel=0.005
    )


@pytest.mark.parametrize("removed", [0.15, 0.3])
def test_time_aware_ranks_are_no_slower_and_no_better_than_plain_ones(prices, removed):
    """Each wins at its own measure: at equal time the priced ranks lose no more, at equal parameters the
    plain ones lose no more.
    """
    plain = layers_of(SHAPE)
    timed = priced(plain, {SHAPE.intermediate_size: prices})
    by_size = allocate(plain, 1 - removed, "uv", 16)
    dense_us, dense_size = (sum(layer[0].dense_cost for layer in layers) for layers in (timed, plain))
    its_us = cost(timed, by_size)
    by_time = allocate(timed, its_us / dense_us, "uv", 16)
    assert cost(timed, by_time) <= its_us * (1 + 1e-9)
    assert loss(plain, by_time) <= loss(plain, by_size) * 1.001
    its_size = cost(plain, by_time)
    assert loss(plain, allocate(plain, its_size / dense_size, "uv", 16)) <= loss(plain, by_time) * 1.001


def test_llama_1b_ranks_land_on_row_tiles():
    """Of the real launches' staircase in uv only edges are worth taking; the last fill may spend a rest
    elsewhere.
    """
    edges = [1152, 1153, 1280, 1281, 1408]
    assert set(edges) <= set(priced_ranks(LLAMA_1B.hidden_size, LLAMA_1B.intermediate_size))
    dense = us(LLAMA_1B, dict.fromkeys(PROJECTIONS, DENSE))
    tables = {}
    for name in ("gate_proj", "down_proj"):  # three tiles of the table: all of it takes a minute
        low = [one_low(name, "uv", rank) - dense * 2 / 3 for rank in edges]
        tables[name] = np.append(np.interp(np.arange(2048), edges, low, right=dense / 3), dense / 3)
    tables["up_proj"] = tables["gate_proj"]
    plain = layers_of(LLAMA_1B)
    ranks = ranks_of(allocate(priced(plain, {LLAMA_1B.intermediate_size: tables}), 0.9, "uv", 16))
    assert len(ranks) > 10
    assert sum(rank % 64 == 0 for rank in ranks) >= 0.8 * len(ranks), ranks  # the others spend what is left
    unpriced = ranks_of(allocate(plain, 0.9, "uv", 16))
    assert sum(rank % 128 == 0 for rank in unpriced) < len(unpriced) / 2


def test_a_level_is_priced_by_one_groups_share_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_models, "SHAPE", MLPShape(256, 1024, 2))
    write_tokenizer(tiny_models.write_dense(tmp_path / "dense", "llama"))
    write_text(tmp_path / "text.jsonl", 6000)
    plan = make_plan(settings_for(tmp_path, tokens=4096, remove=None, faster=1.05, groups=4))
    prices, part = level_prices(plan), MLPShape(256, 768 // 4, 1)
    assert set(prices) == set(plan.levels) and 768 in plan.factored_levels
    dense = us(part, dict.fromkeys(PROJECTIONS, DENSE))
    assert sum(float(prices[768][name][-1]) for name in PROJECTIONS) == pytest.approx(dense)
    assert len(prices[768]["gate_proj"]) == 192 + 1


@pytest.mark.parametrize("allocation", ["global", "measured"])
def test_a_run_reports_the_simulated_time_it_was_asked_for(tmp_path, monkeypatch, allocation):
    monkeypatch.setattr(tiny_models, "SHAPE", MLPShape(256, 512, 2))
    write_tokenizer(tiny_models.write_dense(tmp_path / "dense", "llama"))
    write_text(tmp_path / "text.jsonl", 3000)
    report = compress(
        make_plan(
            settings_for(tmp_path, remove=None, faster=1.05, form="uv", groups=1, allocation=allocation)
        ),
        QUIET,
    )
    decode = report.decode
    assert decode["asked"] == 1.05
    assert decode["simulated_speedup"] > 1.04  # prices are lines between the steps of the row tiles
    assert decode["simulated_us"] < decode["dense_simulated_us"]
    assert decode["simulated_speedup"] == pytest.approx(decode["dense_simulated_us"] / decode["simulated_us"])
    assert len(report.loss_by_size) >= 5


def test_an_mlp_of_one_row_tile_gets_no_faster_and_that_is_said(home):  # noqa: F811
    with pytest.raises(UsageError, match=r"expected at most 0\.00 of the cost"):
        compress(
            make_plan(settings_for(home, remove=None, faster=1.05, form="uv", groups=1, channels="keep")),
            QUIET,
        )
    assert not (home / "out").exists()
