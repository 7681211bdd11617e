"""Remove channels of an MLP: which ones, what it loses, and down's repair.

Kept channels S stand for all by least squares: h ~ A h_S, so down becomes W A with A = C[:, S] C[S, S]^-1,
and the loss is || G^1/2 (W - W A E_S) C^1/2 ||^2, in the units of `decompose`. What is left of W on S, cut to
a rank under C[S, S], loses its tail besides: the two errors are orthogonal, so the losses add up exactly.
"""

from __future__ import annotations

import torch

RIDGE = 1e-6  # share of the mean diagonal that is added to C before it is inverted
BLOCK = 64  # channels after whose removal the matrices are brought up to date, in one product


def ridged(moment: torch.Tensor, share: float = RIDGE) -> torch.Tensor:
    """fp64 C plus a share of its mean diagonal."""
    c = moment.to(torch.float64, copy=True)
    c.diagonal().add_(ridge_of(c, share))
    return c


def ridge_of(moment: torch.Tensor, share: float = RIDGE) -> torch.Tensor:
    """What `ridged` adds to the diagonal."""
    return share * moment.diagonal().double().mean().clamp_min(1e-30)


def eliminate(
    weight: torch.Tensor, moment: torch.Tensor, metric: torch.Tensor, least: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(order [I], loss [I + 1])`: channels from the last to be removed to the first, so that `order[:k]` are
    the k to keep, and `loss[k]` (fp64) what keeping them loses; inf below `least`, where nothing was tried.

    Backward elimination for down `[H, I]` under C `[I, I]` and G `[H, H]`: with P = C^-1 and D = W^T G W the
    removal of channel j, repaired, costs D_jj / P_jj (the step of Optimal Brain Surgeon), and both matrices
    are updated for the ones that stay. With C and G of 1 a channel costs its weight squared: the 1 goes
    first, then the 2, for a loss of 1 + 4.

    >>> order, loss = eliminate(torch.tensor([[3.0, 1.0, 2.0]]), torch.eye(3), torch.eye(1), least=1)
    >>> order.tolist(), loss.round(decimals=3).tolist()
    ([0, 2, 1], [inf, 5.0, 1.0, 0.0])
    """
    w = weight.double()
    state = _Elimination(
        torch.cholesky_inverse(torch.linalg.cholesky(ridged(moment))), w.T @ metric.double() @ w
    )
    channels = len(moment)
    removed: list[int] = []
    losses: list[float] = []
    while channels - len(removed) > least:
        gone, costs = state.block(min(BLOCK, channels - len(removed) - least))
        removed += gone
        losses += costs
    loss = torch.full((channels + 1,), torch.inf, dtype=torch.float64)
    # total[n] is the loss of n channels removed, so it stands at `channels - n` kept.
    total = torch.tensor([0.0, *losses], dtype=torch.float64).cumsum(0)
    loss[channels - len(removed) :] = total.flip(0)
    order = torch.tensor([*state.alive.tolist(), *reversed(removed)], dtype=torch.long)
    return order, loss


class _Elimination:
    """P and D over the channels that are `alive`; inside a block only their diagonals are kept up to date."""

    def __init__(self, p: torch.Tensor, d: torch.Tensor) -> None:
        self.p, self.d = p, d
        self.alive = torch.arange(len(p), device=p.device)

    def block(self, count: int) -> tuple[list[int], list[float]]:
        """Remove `count` channels; which, and what each cost.

        With p and d the columns of P and D at the removed j: P -= p p^T / P_jj, and D loses d q^T + q d^T -
        D_jj q q^T with q = p / P_jj, which is b q^T + q b^T for b = d - D_jj q / 2.
        """
        p_diagonal, d_diagonal = self.p.diagonal().clone(), self.d.diagonal().clone()
        # As far as the block has come P is p - p_done p_done^T, and D is d - b_done q_done^T - q_done
        # b_done^T.
        p_done, q_done, b_done = (self.p.new_zeros(len(self.p), count) for _ in range(3))
        gone: list[int] = []
        costs: list[float] = []
        for step in range(count):
            price = d_diagonal / p_diagonal
            price[gone] = torch.inf
            j = int(price.argmin())
            # Columns j as they are by now: the matrices themselves are those of before the block.
            p = self.p[:, j] - p_done[:, :step] @ p_done[j, :step]
            d = self.d[:, j] - b_done[:, :step] @ q_done[j, :step] - q_done[:, :step] @ b_done[j, :step]
            q = p / p[j]
            b = d - d[j] / 2 * q
            p_done[:, step], q_done[:, step], b_done[:, step] = p / p[j].sqrt(), q, b
            p_diagonal -= p_done[:, step].square()
            d_diagonal -= 2 * b * q
            # D_jj of a channel that down hardly looks at may round below 0, and no removal may gain.
            costs.append(max(float(price[j]), 0.0))
            gone.append(j)
        stay = torch.ones(len(self.p), dtype=torch.bool, device=self.p.device)
        stay[gone] = False
        p_done, q_done, b_done = p_done[stay], q_done[stay], b_done[stay]
        names = self.alive[gone].tolist()
        self.alive = self.alive[stay]
        self.p = self.p[stay][:, stay].addmm_(p_done, p_done.T, alpha=-1)
        self.d = self.d[stay][:, stay].addmm_(b_done, q_done.T, alpha=-1).addmm_(q_done, b_done.T, alpha=-1)
        return names, costs


def leverage_order(moment: torch.Tensor, ridge: float) -> torch.Tensor:
    """`[I]` channels by falling ridge leverage score [C (C + ridge)^-1]_jj: the MLP step of MoDeGPT (arXiv
    2408.09632).
    """
    c = moment.double()
    damped = c + ridge * torch.eye(len(c), dtype=c.dtype, device=c.device)
    scores = torch.linalg.solve(damped, c).diagonal()
    return scores.argsort(descending=True, stable=True)


def repaired(
    weight: torch.Tensor, moment: torch.Tensor, kept: torch.Tensor, passed: torch.Tensor | None = None
) -> torch.Tensor:
    """Down `[H, k]` for the channels `kept [k]`: W C[:, S] (C[S, S] + ridge)^-1, fp64.

    `passed [H, I]`: W C in fp64, for who has it; several repairs of one matrix share it.
    """
    cross = weight.double() @ moment[:, kept].double() if passed is None else passed[:, kept]
    # The ridge in both places: keeping every channel then gives W back.
    ridge = ridge_of(moment)
    own = moment[kept][:, kept].double()
    own.diagonal().add_(ridge)
    cross = cross + ridge * weight[:, kept].double()
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(own)).T
