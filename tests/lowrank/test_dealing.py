from __future__ import annotations

import pytest
import torch

from neuronmlp_plugin.lowrank.dealing import _moves, balanced, deal


def planted(
    groups: int = 2, size: int = 24, width: int = 16, rank: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows [1, I, H]` whose groups lie near spaces of their own, shuffled; and the groups."""
    g = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(size, rank, generator=g) @ torch.randn(rank, width, generator=g) for _ in range(groups)
    ]
    rows = torch.cat(parts) + 0.05 * torch.randn(groups * size, width, generator=g)
    order = torch.randperm(len(rows), generator=g)
    return rows[order][None].double(), torch.arange(groups).repeat_interleave(size)[order]


def tails(rows: torch.Tensor, dealt: torch.Tensor, groups: int, rank: int) -> float:
    parts = [
        torch.linalg.svdvals(matrix[dealt == t]).square()[rank:].sum()
        for matrix in rows
        for t in range(groups)
    ]
    return float(torch.stack(parts).sum())


def test_planted_groups_are_found():
    rows, truth = planted()
    dealt = deal(rows, 2, [4])
    assert dealt.bincount().tolist() == [24, 24]
    assert abs(int((dealt == truth).sum()) - 24) >= 22  # up to the groups' names
    assert tails(rows, dealt, 2, 4) < 0.2 * tails(rows, torch.arange(48) % 2, 2, 4)


def test_swaps_lose_less_than_a_cyclic_deal_of_nothing_special():
    rows = torch.randn(3, 60, 20, generator=torch.Generator().manual_seed(1)).double()
    cyclic = torch.arange(60) % 3
    assert tails(rows, deal(rows, 3, [8] * 3), 3, 8) < tails(rows, cyclic, 3, 8)


@pytest.mark.parametrize("channel", [0, 17])
def test_a_move_changes_the_value_by_what_was_said(channel):
    rows, _ = planted(3, 8, 10, 3)
    dealt, prices = torch.arange(24) % 3, torch.tensor([0.5], dtype=torch.float64)
    before, moves = _moves(rows, dealt, 3, prices)
    for group in range(3):
        if group == int(dealt[channel]):
            assert moves[group, channel] == torch.inf
            continue
        moved = dealt.clone()
        moved[channel] = group
        assert _moves(rows, moved, 3, prices)[0] - before == pytest.approx(
            float(moves[group, channel]), rel=1e-6
        )


def test_unequal_groups_become_equal_and_equal_ones_stay():
    rows, _ = planted(3, 8, 10, 3)
    uneven = torch.tensor([0] * 14 + [1] * 7 + [2] * 3)
    dealt = balanced(rows, uneven, 3, [3])
    assert dealt.bincount().tolist() == [8, 8, 8]
    assert int((dealt != uneven).sum()) == 6  # no more than had to move
    assert balanced(rows, dealt, 3, [3]).tolist() == dealt.tolist()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rows_in_fewer_directions_than_ranks_are_dealt_all_the_same(scale):
    """As few tokens leave them: prices are rounding, and fp32 has no inverse beside them."""
    torch.manual_seed(3)
    rows = torch.randn(2, 96, 5) @ torch.randn(2, 5, 64) * torch.tensor([scale, 1e3 * scale])[:, None, None]
    dealt = deal(rows, groups=4, ranks=[12, 16])
    assert torch.bincount(dealt).tolist() == [24] * 4


def test_one_group_needs_no_deal():
    assert deal(torch.randn(3, 8, 4), 1, [2] * 3).tolist() == [0] * 8
