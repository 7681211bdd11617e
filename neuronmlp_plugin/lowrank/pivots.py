"""The compact form: R channels of a rank-R matrix stand for all, and one order of the channels serves a whole
MLP.

Lossless and cheaper at every R (PIFA, 2501.19090): R (in + out - R) numbers instead of R (in + out). What can
go wrong is conditioning: c = rest pivots^-1 must stay small, or bf16 rounding of c swamps the result (32 %
without pivoting, 0.3-1 % with it: docs/method.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

# How many candidate channels are looked at closely per round, and how many of them may be taken in it.
CANDIDATES, ROUND = 384, 64


class _Basis:
    """An orthonormal basis `[I, R]` whose rows are being chosen: QR with row pivoting, kept as a pivoted
    Cholesky of Q Q^T.

    `left[i]` is what remains of row i's squared norm after the chosen rows are projected out; it only ever
    shrinks.
    """

    def __init__(self, basis: torch.Tensor) -> None:
        # Orthonormal, so that what remains of a row means the same in every basis, whatever its columns'
        # scale; R columns even where the factor has a lower rank, which then shows in the solve.
        self.q = torch.linalg.qr(basis.double()).Q
        self.rank = basis.shape[1]
        self.factor = torch.zeros(basis.shape[0], self.rank, dtype=torch.float64)
        self.left = self.q.square().sum(1)
        self.taken = 0

    def gram(self, rows: torch.Tensor) -> torch.Tensor:
        """Inner products of the remains of some rows."""
        # Projecting rows out of Q is subtracting the outer products of a Cholesky factor from Q Q^T: Q itself
        # stays as it is, and a pivot costs R products a channel.
        q, done = self.q[rows], self.factor[rows, : self.taken]
        return q @ q.T - done @ done.T

    def take(self, rows: torch.Tensor) -> None:
        """Project the (independent) `rows`, at most rank - taken, out of all others."""
        # A block step of Cholesky: the rows' own triangle first, then what is left of all rows against it.
        triangle = torch.linalg.cholesky(self.gram(rows))
        done = self.factor[:, : self.taken]
        against = self.q @ self.q[rows].T - done @ done[rows].T
        columns = torch.linalg.solve_triangular(triangle, against.T, upper=False).T
        self.factor[:, self.taken : self.taken + len(rows)] = columns
        self.left = (self.left - columns.square().sum(1)).clamp_min(0.0)
        self.taken += len(rows)


def common_order(bases: Sequence[torch.Tensor]) -> torch.Tensor:
    """One permutation of I channels whose first R_i entries are good pivots for each basis i (`[I, R_i]`, any
    spanning columns).

    Greedy: each step takes the channel with the largest sum of log residual norms over the bases that still
    need pivots, so with different ranks the sets are nested. Steps are batched: within a round a candidate is
    taken only while its score beats what every channel outside the candidates had at the start of the round,
    which bounds what it has now: the result is the unbatched greedy's.

    Two bases: channels 2 and 1 point in two directions of the first, and the second has all it needs in 1.

    >>> bases = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([[0.1], [3.0], [1.0]])
    >>> common_order(bases).tolist()
    [1, 2, 0]
    """
    with _one_thread():
        return _common_order([_Basis(basis) for basis in bases], bases[0].shape[0])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small products: a second thread gains nothing, and on a busy machine its waiting costs ten
    times the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _common_order(active: list[_Basis], size: int) -> torch.Tensor:
    chosen: list[int] = []
    free = torch.ones(size, dtype=torch.bool)
    while any(b.taken < b.rank for b in active):
        needy = [b for b in active if b.taken < b.rank]
        scores = _score([b.left for b in needy]).masked_fill(~free, -torch.inf)
        best = torch.topk(scores, min(CANDIDATES + 1, int(free.sum())))
        candidates = best.indices[:CANDIDATES]
        bound = float(best.values[-1]) if len(best.values) > CANDIDATES else -torch.inf
        # Not past the end of any basis: from there on it has no say in the order.
        steps = min([ROUND] + [b.rank - b.taken for b in needy])
        rows = candidates[_greedy_among([b.gram(candidates) for b in needy], bound, steps)]
        for basis in needy:
            basis.take(rows)
        chosen += rows.tolist()
        free[rows] = False
    # The others need no order: no basis has a pivot among them.
    return torch.cat((torch.tensor(chosen, dtype=torch.long), free.nonzero()[:, 0]))


def _score(lefts: Sequence[torch.Tensor]) -> torch.Tensor:
    # Logs: the volumes that the pivots of all bases span, multiplied, grow by this. A sum of the norms
    # themselves would take a channel that is excellent for one basis and useless to another.
    return torch.stack([left.clamp_min(1e-300).log() for left in lefts]).sum(0)


def _greedy_among(grams: list[torch.Tensor], bound: float, steps: int) -> torch.Tensor:
    """Positions, in order, of the greedy's choices among a few candidates; at least one, at most `steps`."""
    chosen: list[int] = []
    grams = [gram.clone() for gram in grams]
    open_ = torch.ones(grams[0].shape[0], dtype=torch.bool)
    while len(chosen) < steps and bool(open_.any()):
        scores = _score([gram.diagonal() for gram in grams]).masked_fill(~open_, -torch.inf)
        best = int(scores.argmax())
        # A channel outside the candidates may now be better; the next round looks at all of them. The first
        # choice needs no such test: the candidates are the best of all at the start of a round.
        if chosen and float(scores[best]) < bound:
            break
        for gram in grams:
            # One step of Cholesky: what is left of the candidates once `best` is projected out.
            column = gram[:, best] / gram[best, best].clamp_min(1e-300).sqrt()
            gram.sub_(torch.outer(column, column))
        chosen.append(best)
        open_[best] = False
    return torch.tensor(chosen, dtype=torch.long)


def pivot_outputs(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(u [R, in], c [out - R, R])` of second `[out, R]` first `[R, in]`, whose first R outputs become z;
    fp64 inside. z = x u^T is output 0 itself, and outputs 1 and 2 are 3 z and -2 z:

    >>> u, c = pivot_outputs(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0], [6.0], [-4.0]]))
    >>> u.tolist(), c.tolist()
    ([[2.0, 4.0]], [[3.0], [-2.0]])
    """
    rank = first.shape[0]
    # fp64, because what the solve loses grows with the condition of the pivots, and is then stored in c.
    pivots, rest = second[:rank].double(), second[rank:].double()
    return pivots @ first.double(), torch.linalg.solve(pivots, rest, left=False)


def pivot_inputs(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(c [R, in - R], v [out, R])` of second `[out, R]` first `[R, in]`, whose first R inputs pass into z as
    they are; fp64 inside. z = input 0 + 3 x input 1, and the outputs are 2 z and 10 z:

    >>> c, v = pivot_inputs(torch.tensor([[2.0, 6.0]]), torch.tensor([[1.0], [5.0]]))
    >>> c.tolist(), v.tolist()
    ([[3.0]], [[2.0], [10.0]])
    """
    rank = first.shape[0]
    pivots, rest = first[:, :rank].double(), first[:, rank:].double()
    return torch.linalg.solve(pivots, rest), second.double() @ pivots
