from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings

from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.lowrank.allocate import (
    Choice,
    Curve,
    Level,
    cost,
    most_removable,
    parts,
    rank_for_share,
    uniform,
)
from neuronmlp_plugin.lowrank.allocate import allocate as allocate_layers


def curve(out: int, n_in: int, decay: float, weight: float = 1.0) -> Curve:
    energy = weight * np.exp(-decay * np.arange(min(out, n_in)))
    return Curve(out, n_in, np.append(np.cumsum(energy[::-1])[::-1], 0.0))


def single(curves) -> list[list[Level]]:
    """Each matrix as a layer of its own, which keeps all channels."""
    return [[Level(c.out_features, 0.0, (c,))] for c in curves]


def allocate(curves, keep, form, multiple) -> list[int | None]:
    return [choice.ranks[0] for choice in allocate_layers(single(curves), keep, form, multiple)]


def uniform_ranks(curves, keep, form, multiple) -> list[int | None]:
    return [choice.ranks[0] for choice in uniform(single(curves), keep, form, multiple)]


def spent(curves, ranks, form) -> int:
    return sum(
        c.dense_cost if r is None else cost(r, c.in_features, c.out_features, form)
        for c, r in zip(curves, ranks, strict=True)
    )


def loss(curves, ranks) -> float:
    return sum(0.0 if r is None else float(c.tail[r]) for c, r in zip(curves, ranks, strict=True))


CURVES = [curve(96, 64, 0.01 * (i + 1), 1.0 + 3 * (i % 3)) for i in range(12)]


@pytest.mark.parametrize("form", ["uv", "compact"])
@pytest.mark.parametrize("removed", [0.05, 0.1, 0.2, 0.4])
def test_budget_is_met_within_half_a_percent(form, removed):
    ranks = allocate(CURVES, 1 - removed, form, 1)
    total = sum(c.dense_cost for c in CURVES)
    assert 0 <= (1 - removed) * total - spent(CURVES, ranks, form) <= 0.005 * total


@pytest.mark.parametrize("form", ["uv", "compact"])
@pytest.mark.parametrize("removed", [0.05, 0.2])
def test_allocation_beats_uniform_at_equal_bytes(form, removed):
    uniform = uniform_ranks(CURVES, 1 - removed, form, 1)
    keep = spent(CURVES, uniform, form) / sum(c.dense_cost for c in CURVES)
    assert loss(CURVES, allocate(CURVES, keep, form, 1)) < 0.95 * loss(CURVES, uniform)


def test_small_removals_leave_most_matrices_dense_in_uv_form():
    ranks = allocate(CURVES, 0.95, "uv", 1)
    assert sum(r is None for r in ranks) > len(CURVES) / 2


@given(
    st.lists(st.tuples(st.floats(0.005, 0.3), st.floats(0.1, 10)), min_size=3, max_size=3),
    st.floats(0.05, 0.4),
)
@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.filter_too_much]
)  # 7 draws in 10 miss the 0.5 %
def test_allocation_is_close_to_the_best_of_all_choices(shapes, removed):
    curves = [curve(24, 16, decay, weight) for decay, weight in shapes]
    keep = 1 - removed
    try:
        ranks = allocate(curves, keep, "compact", 1)
    except UsageError:  # too few choices to come within half a percent
        reject()
    choices = [[None, *range(4, 16)] for _ in curves]
    budget = keep * sum(c.dense_cost for c in curves)
    best = min(
        loss(curves, pick) for pick in itertools.product(*choices) if spent(curves, pick, "compact") <= budget
    )
    # A greedy fill on a knapsack is not exact: it may lose what one step of one matrix is worth.
    step = max(float(np.max(-np.diff(c.tail[4:]))) for c in curves)
    assert loss(curves, ranks) <= best + 2 * step + 1e-9


@pytest.mark.parametrize("form", ["uv", "compact"])
@pytest.mark.parametrize("keep", [0.6, 0.8, 0.95])
def test_rank_for_share_inverts_the_cost(form, keep):
    rank = rank_for_share(keep, 64, 96, form)
    assert rank * (160 - (rank if form == "compact" else 0)) == pytest.approx(keep * 64 * 96)


def test_uniform_ranks_match_the_arithmetic_of_the_paper():
    # shared svd.md section 3: Llama-3.2-1B, removed 0.20, floor to 128
    assert uniform_ranks([curve(8192, 2048, 0.1)], 0.8, "uv", 128) == [1280]
    assert uniform_ranks([curve(8192, 2048, 0.1)], 0.95, "uv", 128) == [1536]


def test_asking_for_too_much_is_refused():
    with pytest.raises(UsageError, match="at most"):
        allocate(CURVES, 0.05, "uv", 1)


def test_a_multiple_that_cannot_meet_the_budget_is_refused():
    with pytest.raises(UsageError, match="rank-multiple"):
        allocate([curve(96, 64, 0.1)], 0.97, "uv", 16)


def staircase(c: Curve, tile: int, form: str) -> Curve:
    """`c` at a price that rises by whole tiles of ranks, as a kernel's time does."""
    ranks = np.minimum(-(-np.arange(len(c.tail)) // tile) * tile, len(c.tail) - 1)
    prices = np.array([cost(int(r), c.in_features, c.out_features, form) for r in ranks], dtype=float)
    prices[-1] = c.out_features * c.in_features
    return Curve(c.out_features, c.in_features, c.tail, prices=prices)


SHAPES = st.lists(st.tuples(st.floats(0.005, 0.2), st.floats(0.1, 10)), min_size=8, max_size=14)


@given(SHAPES, st.floats(0.05, 0.5), st.sampled_from(["uv", "compact"]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_budget_is_held_whatever_it_counts(shapes, removed, form, stairs):
    curves = [curve(48, 32, decay, weight) for decay, weight in shapes]
    curves = [staircase(c, 4, form) for c in curves] if stairs else curves
    try:
        ranks = allocate(curves, 1 - removed, form, 1)
    except UsageError:
        reject()
    total = sum(c.dense_cost for c in curves)
    used = sum(c.cost(r, form) for c, r in zip(curves, ranks, strict=True))
    left = (1 - removed) * total - used
    assert left >= -1e-6 and (stairs or left <= 0.005 * total)


@given(SHAPES, st.floats(0.05, 0.3), st.floats(0.05, 0.2), st.sampled_from(["uv", "compact"]))
@settings(deadline=None, max_examples=40)
def test_taking_more_away_never_loses_less(shapes, removed, more, form):
    curves = [curve(48, 32, decay, weight) for decay, weight in shapes]
    try:
        less_cut, more_cut = (allocate(curves, 1 - share, form, 1) for share in (removed, removed + more))
    except UsageError:
        reject()
    assert loss(curves, less_cut) <= loss(curves, more_cut) + 1e-9


@pytest.mark.parametrize("form", ["uv", "compact"])
def test_ranks_stop_at_the_edges_of_a_staircase(form):
    ranks = allocate([staircase(c, 8, form) for c in CURVES], 0.8, form, 1)
    low = [r for r in ranks if r is not None]
    assert low and all(r % 8 == 0 for r in low)


@pytest.mark.parametrize("form", ["uv", "compact"])
def test_the_most_removable_share_is_where_refusals_begin(form):
    most = most_removable(single(CURVES), form, 1)
    allocate(CURVES, 1 - most + 1e-9, form, 1)
    with pytest.raises(UsageError, match="at most"):
        allocate(CURVES, 1 - most - 1e-3, form, 1)


def levels(seed: int = 0, groups: int = 1) -> list[Level]:
    """A layer of 64 channels and H 32 that may lose some: fewer channels, lower tails."""
    found = []
    for kept in (64, 48, 32):
        part = kept // groups
        curves = tuple(
            Curve(*size, curve(*size, 0.05 + 0.01 * seed, kept / 64).tail, groups)
            for size in ((part, 32), (part, 32), (32, part))
        )
        found.append(Level(kept, (64 - kept) ** 2 / 20 * (1 + seed), curves))
    return found


def layer_cost(layer: list[Level], choice: Choice, form: str) -> float:
    level = next(level for level in layer if level.kept == choice.kept)
    return sum(c.cost(rank, form) for c, rank in zip(level.curves, choice.ranks, strict=True))


def every_choice(layer: list[Level], multiple: int) -> list[Choice]:
    offered = []
    for level in layer:
        ranks = [[None, *range(8, min(c.out_features, c.in_features), multiple)] for c in level.curves]
        offered += [Choice(level.kept, pick) for pick in itertools.product(*ranks)]
    return offered


@pytest.mark.parametrize("removed", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("groups", [1, 2])
def test_channels_and_ranks_together_are_nearly_the_best_of_all_combinations(removed, groups):
    layer = levels(groups=groups)
    choice = allocate_layers([layer] * 4, 1 - removed, "compact", 2)
    total = sum(layer_cost(layer, c, "compact") for c in choice)
    assert total <= (1 - removed) * 4 * 3 * 64 * 32
    affordable = [c for c in every_choice(layer, 2) if layer_cost(layer, c, "compact") <= total / 4]
    best = min(sum(parts(layer, c)) for c in affordable)
    assert sum(sum(parts(layer, c)) for c in choice) / 4 <= best * 1.05


def test_only_layers_that_lose_little_lose_channels():
    cheap, dear = levels(0), levels(0)
    dear = [Level(level.kept, level.removal * 1e6, level.curves) for level in dear]
    kept = [c.kept for c in allocate_layers([cheap, dear] * 3, 0.8, "narrow", 1)]
    assert kept[1::2] == [64] * 3 and all(k < 64 for k in kept[::2])


def test_narrow_matrices_stay_dense_and_uniform_ones_keep_alike():
    layers = [levels(seed) for seed in range(3)]
    assert all(c.ranks == (None,) * 3 for c in allocate_layers(layers, 0.7, "narrow", 1))
    assert uniform(layers, 0.8, "narrow", 1) == [Choice(48, (None,) * 3)] * 3
    with pytest.raises(UsageError, match="of the channels taken away"):
        uniform(layers, 0.3, "narrow", 1)


def test_a_level_without_curves_offers_its_dense_matrices_alone():
    whole, slim = levels()[:2]
    bare = Level(
        48,
        0.01,
        tuple(Curve(c.out_features, c.in_features, np.append(np.full(32, np.inf), 0.0)) for c in slim.curves),
    )
    choices = allocate_layers([[whole, bare]] * 4, 0.75, "compact", 2)
    assert all(c.kept == 64 or c.ranks == (None,) * 3 for c in choices) and any(c.kept == 48 for c in choices)


def test_slices_cost_what_all_groups_of_them_cost():
    c = Curve(24, 16, np.zeros(17), groups=3)
    assert c.dense_cost == 3 * 24 * 16 and c.cost(5, "compact") == 3 * 5 * (24 + 16 - 5)
