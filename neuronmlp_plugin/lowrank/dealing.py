"""Deal the channels of an MLP into groups of equal size whose slices of gate, up and down have low rank.

What a deal is worth is the sum of the tails that its slices are cut to. A smooth stand-in for it, with the
price mu of a rank, sums l mu / (l + mu) over the squared singular values l of every slice. With X the rows of
a slice and B = (X^T X / mu + 1)^-1 that is mu (H - tr B), and what one row x adds to it, or takes from it,
follows from x^T B x and x^T B^2 x: one factorisation a slice prices every single move. Channels then swap in
pairs, the best movers first.
"""

from __future__ import annotations

import itertools

import torch

SWEEPS = 12
FIRST_SHARE, SHRINK = 0.25, 0.85  # of a group that swaps in the first sweep; times this in each later one
GAIN = 4e-4  # a sweep that gains less than this share ends the search
LEAST_PRICE = 1e-10  # of a rank, over the largest squared singular value: fp64 adds 1 to their quotient


def deal(
    rows: torch.Tensor,
    groups: int,
    ranks: list[int],
    start: torch.Tensor | None = None,
    sweeps: int = SWEEPS,
) -> torch.Tensor:
    """`[I]` the group (0 ... groups - 1) of each channel; all groups have I / groups of them.

    `rows [M, I, H]`: a row a channel of M whitened matrices, whose losses add up; `ranks [M]`: the rank of a
    slice of each, roughly (it sets the price mu). `start` is a deal to begin from; cyclic without. At most
    `sweeps` rounds of swaps. Three channels each way, mixed by the cyclic start, find their own kind:

    >>> rows = torch.tensor([[[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3])
    >>> deal(rows, groups=2, ranks=[1]).tolist()
    [0, 0, 0, 1, 1, 1]
    """
    channels = rows.shape[1]
    assigned = torch.arange(channels, device=rows.device) % groups if start is None else start.clone()
    if groups == 1:
        return assigned
    # Once: under other prices the values of two sweeps could not be compared.
    prices = _prices(rows, assigned, groups, ranks)
    best, least, share = assigned, float("inf"), FIRST_SHARE
    for _ in range(sweeps):
        value, moves = _moves(rows, assigned, groups, prices)
        if value < least:
            done, best, least = least - value < GAIN * value, assigned, value
        else:
            # Worse: moves are priced one by one, and too many were made at once. On from here with fewer,
            # until even few do not help.
            done = share < FIRST_SHARE / 4
            share *= SHRINK
        if done:
            break
        assigned = _swapped(assigned, moves, groups, max(1, int(share * channels / groups)))
        share *= SHRINK
    return best


def balanced(rows: torch.Tensor, assigned: torch.Tensor, groups: int, ranks: list[int]) -> torch.Tensor:
    """A deal of unequal groups made equal: the cheapest movers go from the groups that are too large to those
    that are too small.
    """
    channels = rows.shape[1]
    counts = torch.bincount(assigned, minlength=groups).tolist()
    if len(set(counts)) == 1:
        return assigned
    # Prices are means over slices of one size, which these groups do not have yet.
    cyclic = torch.arange(channels, device=rows.device) % groups
    movers = [
        channel for channel, group in enumerate(assigned.tolist()) if counts[group] > channels // groups
    ]
    places = torch.tensor(movers, device=rows.device)
    _, moves = _moves(rows, assigned, groups, _prices(rows, cyclic, groups, ranks), places)
    dealt = assigned.tolist()
    for move in moves.flatten().argsort().tolist():
        group, place = divmod(move, len(movers))
        channel = movers[place]
        if counts[dealt[channel]] > channels // groups > counts[group]:
            counts[dealt[channel]] -= 1
            counts[group] += 1
            dealt[channel] = group
    return torch.tensor(dealt, device=rows.device)


def _prices(rows: torch.Tensor, assigned: torch.Tensor, groups: int, ranks: list[int]) -> torch.Tensor:
    """mu `[M]`: the squared singular value at each matrix's rank, mean over the slices."""
    slices = torch.stack(
        [rows[:, assigned == group][:, : rows.shape[1] // groups] for group in range(groups)], 1
    )
    wide = slices.shape[2] <= slices.shape[3]
    # `[M, groups, n]`, descending, of the smaller Gram matrix of each slice: the same squared values.
    spectra = torch.linalg.eigvalsh(slices @ slices.mT if wide else slices.mT @ slices).flip(-1)
    at = [
        matrix[:, min(rank, spectra.shape[-1] - 1)].mean()
        for matrix, rank in zip(spectra, ranks, strict=True)
    ]
    # A slice of a lower rank than this has nothing there but rounding, and mu divides.
    floors = LEAST_PRICE * spectra.amax(dim=(1, 2))
    return torch.stack(at).maximum(floors).clamp_min(torch.finfo(rows.dtype).tiny)


def _inverse(part: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """(part^T part / mu + 1)^-1 `[M, H, H]` of `part [M, n, H]`, `mu [M, 1, 1]`."""
    eye = torch.eye(part.shape[2], dtype=part.dtype, device=part.device)
    root, failed = torch.linalg.cholesky_ex(part.mT @ part / mu + eye)
    if bool(failed.any()):  # fp32 loses the 1 beside what few tokens leave in few directions
        wide = part.double()
        root = torch.linalg.cholesky(wide.mT @ wide / mu.double() + eye.double())
    return torch.cholesky_inverse(root).to(part.dtype)


def _moves(
    rows: torch.Tensor,
    assigned: torch.Tensor,
    groups: int,
    prices: torch.Tensor,
    movers: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor]:
    """The value of a deal, and `[groups, I]` what moving one channel to a group changes it by (inf for its
    own); `[groups, m]` for the channels `movers [m]` alone.
    """
    width = rows.shape[2]
    moving, own = (rows, assigned) if movers is None else (rows[:, movers], assigned[movers])
    mu = prices[:, None]
    table, value = rows.new_empty(groups, len(own)), 0.0
    for group in range(groups):
        # [M, n, H] of the group; B [M, H, H]; x^T B x and x^T B^2 x of every channel that may move [M, m].
        part = rows[:, assigned == group]
        inverse = _inverse(part, mu[..., None])
        value += float((prices * (width - inverse.diagonal(dim1=1, dim2=2).sum(1))).sum())
        product = moving @ inverse
        # Sherman-Morrison: with x x^T / mu more under the inverse, tr B falls by x^T B^2 x / mu over
        # 1 + x^T B x / mu; with it less, it rises by the same over 1 - x^T B x / mu, which is near 0 for a
        # channel that has a direction to itself. The value is mu (H - tr B): its mu cancels that one.
        two = torch.linalg.vector_norm(product, dim=2).square()
        one = product.mul_(moving).sum(2) / mu
        change = torch.where(own == group, -two / (1 - one).clamp_min(1e-4), two / (1 + one))
        table[group] = change.sum(0)
    # Leaving its own group, and joining the other.
    moves = (table + table.gather(0, own[None])).scatter(0, own[None], torch.inf)
    return value, moves


def _swapped(assigned: torch.Tensor, moves: torch.Tensor, groups: int, most: int) -> torch.Tensor:
    """After swapping the best movers of every pair of groups, at most `most` of a group in all."""
    assigned, members = assigned.clone(), [(assigned == group).nonzero()[:, 0] for group in range(groups)]
    free = torch.ones(len(assigned), dtype=torch.bool, device=assigned.device)
    # A group is in groups - 1 pairs, which share what it may swap.
    quota = max(1, most // (groups - 1))
    for a, b in itertools.combinations(range(groups), 2):
        # `members` are those of before: who has been swapped since is not free, so no channel moves twice.
        there, back = (_best(moves[to], members[of][free[members[of]]]) for of, to in ((a, b), (b, a)))
        count = min(len(there), len(back), quota)
        # Both moves are priced alone; what the two channels are to each other shows in the next sweep.
        gains = moves[b, there[:count]] + moves[a, back[:count]]
        count = int((gains < 0).sum())
        there, back = there[:count], back[:count]
        assigned[there], assigned[back] = b, a
        free[there] = free[back] = False
    return assigned


def _best(moves: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    return members[moves[members].argsort()]
