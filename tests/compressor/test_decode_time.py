"""Ranks priced by simulated decode time: what the prices are, and what a knapsack does with them."""

from __future__ import annotations

import numpy as np
import pytest

from neuronmlp_plugin.compressor.build import priced
from neuronmlp_plugin.compressor.decode_time import model_us, priced_ranks, rank_prices
from neuronmlp_plugin.compressor.plan import make_plan
from neuronmlp_plugin.compressor.run import compress
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.lowrank.allocate import allocate
from neuronmlp_plugin.models.factors import DENSE, PROJECTIONS, MLPShape, ProjectionSpec
from tests import tiny_models
from tests.compressor.test_compress import QUIET, home, settings_for  # noqa: F401 (home is a fixture)
from tests.letters import write_text, write_tokenizer
from tests.lowrank.test_allocate import curve, loss

SHAPE = MLPShape(512, 1024, 4)
LLAMA_1B = MLPShape(2048, 8192, 16)


@pytest.fixture(scope="module")
def prices() -> dict[str, np.ndarray]:
    return rank_prices(SHAPE, "uv")


def layers(ranks, form):
    specs = [DENSE if rank is None else ProjectionSpec(form, rank) for rank in ranks]
    return [dict(zip(PROJECTIONS, specs[i : i + 3], strict=True)) for i in range(0, len(specs), 3)]


def curves_of(shape: MLPShape) -> list:
    sizes = [shape.in_out(name)[::-1] for _ in range(shape.num_layers) for name in PROJECTIONS]
    return [curve(*size, 0.002 * (1 + i % 5), 1.0 + 2 * (i % 3)) for i, size in enumerate(sizes)]


def test_prices_rise_by_row_tiles(prices):
    for name in PROJECTIONS:
        step = np.diff(prices[name][:-1])
        inside, across = step[256 : 256 + 126].mean(), prices[name][257] - prices[name][256]
        assert across > 5 * abs(inside), name


def test_the_sum_of_prices_is_near_the_time_of_the_launch(prices):
    """Within a tenth where a launch takes 13 us, much of it latency; real sizes below."""
    made = [
        {
            "gate_proj": ProjectionSpec("uv", 256),
            "up_proj": ProjectionSpec("uv", 128),
            "down_proj": ProjectionSpec("uv", 256),
        }
    ]
    summed = sum(float(prices[name][spec.rank]) for name, spec in made[0].items())
    assert summed == pytest.approx(model_us(SHAPE, made), rel=0.1)
    assert sum(float(prices[name][-1]) for name in PROJECTIONS) == pytest.approx(
        model_us(SHAPE, [dict.fromkeys(PROJECTIONS, DENSE)])
    )


def one_low(name: str, form: str, rank: int) -> float:
    """Simulated us of a Llama-3.2-1B MLP with one low-rank projection."""
    return model_us(LLAMA_1B, [{**dict.fromkeys(PROJECTIONS, DENSE), name: ProjectionSpec(form, rank)}])


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_between_the_ends_of_a_tile_time_is_a_straight_line(name):
    assert one_low(name, "uv", 1216) == pytest.approx(
        (one_low(name, "uv", 1153) + one_low(name, "uv", 1280)) / 2, rel=0.002
    )


def test_on_real_sizes_the_sum_of_prices_is_the_launch_within_half_a_percent():
    dense = model_us(LLAMA_1B, [dict.fromkeys(PROJECTIONS, DENSE)])
    summed = 2 * one_low("gate_proj", "uv", 1280) + one_low("down_proj", "uv", 1280) - 2 * dense
    assert summed == pytest.approx(
        model_us(LLAMA_1B, [dict.fromkeys(PROJECTIONS, ProjectionSpec("uv", 1280))]), rel=0.005
    )


@pytest.mark.parametrize("removed", [0.15, 0.3])
def test_time_aware_ranks_are_no_slower_and_no_better_than_plain_ones(prices, removed):
    """Each wins at its own measure: at equal time the priced ranks lose no more, at equal parameters the
    plain ones lose no more.
    """
    plain = curves_of(SHAPE)
    timed = priced(plain, prices)
    by_size = allocate(plain, 1 - removed, "uv", 16)
    dense_us, dense_size = sum(c.dense_cost for c in timed), sum(c.dense_cost for c in plain)
    its_us = sum(c.cost(r, "uv") for c, r in zip(timed, by_size, strict=True))
    by_time = allocate(timed, its_us / dense_us, "uv", 16)
    assert sum(c.cost(r, "uv") for c, r in zip(timed, by_time, strict=True)) <= its_us * (1 + 1e-9)
    assert loss(plain, by_time) <= loss(plain, by_size)
    its_size = sum(c.cost(r, "uv") for c, r in zip(plain, by_time, strict=True))
    assert loss(plain, allocate(plain, its_size / dense_size, "uv", 16)) <= loss(plain, by_time)


def test_llama_1b_ranks_land_on_row_tiles():
    """Of the real launches' staircase in uv only edges are worth taking; the last fill may spend a rest
    elsewhere.
    """
    edges = [1152, 1153, 1280, 1281, 1408]
    assert set(edges) <= set(priced_ranks(LLAMA_1B))
    dense = model_us(LLAMA_1B, [dict.fromkeys(PROJECTIONS, DENSE)])
    tables = {}
    for name in ("gate_proj", "down_proj"):  # three tiles of the table: all of it takes a minute
        low = [one_low(name, "uv", rank) - dense * 2 / 3 for rank in edges]
        tables[name] = np.append(np.interp(np.arange(2048), edges, low, right=dense / 3), dense / 3)
    tables["up_proj"] = tables["gate_proj"]
    ranks = [
        rank for rank in allocate(priced(curves_of(LLAMA_1B), tables), 0.9, "uv", 16) if rank is not None
    ]
    assert len(ranks) > 10
    assert sum(rank % 128 == 0 for rank in ranks) >= len(ranks) - 2
    plain = [rank for rank in allocate(curves_of(LLAMA_1B), 0.9, "uv", 16) if rank is not None]
    assert sum(rank % 128 == 0 for rank in plain) < len(plain) / 2


@pytest.mark.parametrize("allocation", ["global", "measured"])
def test_a_run_reports_the_simulated_time_it_was_asked_for(tmp_path, monkeypatch, allocation):
    monkeypatch.setattr(tiny_models, "SHAPE", MLPShape(256, 512, 2))
    write_tokenizer(tiny_models.write_dense(tmp_path / "dense", "llama"))
    write_text(tmp_path / "text.jsonl", 3000)
    report = compress(
        make_plan(settings_for(tmp_path, remove=None, faster=1.05, form="uv", allocation=allocation)), QUIET
    )
    decode = report["decode"]
    assert decode["asked"] == 1.05
    assert decode["simulated_speedup"] > 1.04  # prices are lines between the steps of the row tiles
    assert decode["simulated_us"] < decode["dense_simulated_us"]
    assert decode["simulated_speedup"] == pytest.approx(decode["dense_simulated_us"] / decode["simulated_us"])
    assert len(report["loss_by_size"]) >= 5


def test_an_mlp_of_one_row_tile_gets_no_faster_and_that_is_said(home):  # noqa: F811
    with pytest.raises(UsageError, match=r"expected at most 0\.00 of the cost"):
        compress(make_plan(settings_for(home, remove=None, faster=1.05, form="uv")), QUIET)
    assert not (home / "out").exists()
