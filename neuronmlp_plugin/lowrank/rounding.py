"""Round factors to integers so that later numbers make up for what earlier ones lost.

The loss of a rounded weight W' `[n, m]` that meets inputs of moment C and whose outputs matter by a metric S
is

    tr(S (W - W') C (W - W')^T),

of which plain rounding minimises only the diagonal. Error feedback (GPTQ, arXiv 2210.17323) treats C; here it
treats both sides, because a factor has a Gram matrix on each: its input's moment, and what the other factor
makes of its output.
"""

from __future__ import annotations

import torch

# Of a mean diagonal, added to the diagonal: keeps the factorisation finite where a Gram matrix is singular.
DAMPING = 1e-6
BLOCK = 64  # rows and columns of a tile, behind which what it lost is carried on in one product


def round_under(
    weight: torch.Tensor,
    step: torch.Tensor,
    limit: int,
    inputs: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
    damping: float = DAMPING,
) -> torch.Tensor:
    """Integers q `[n, m]`, |q| <= limit, with a small tr(S D C D^T), D = weight - q step, for C = `inputs`
    `[m, m]` and S = `outputs` `[n, n]`; None is the identity, and without both this is plain rounding.

    `step` >= 0 broadcasts to `weight`. Column by column, and inside a column row by row, each number is
    rounded to the best value given all that came before it: what was lost moves the later columns of its row
    by C, and the later rows of its column by S. Inputs that move together: what the first number loses (0.4)
    is given to the second (0.76), so that the sum 0.8 becomes 1 and not 0.

    >>> together = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> round_under(torch.tensor([[0.4, 0.4]]), torch.tensor(1.0), limit=127, inputs=together).tolist()
    [[0.0, 1.0]]
    """
    left = weight.float().clone()
    # A channel of zeros has step 0; with any other its integers are 0 and nothing is divided by 0.
    step = step.float().where(step > 0, 1.0).expand_as(left)
    if inputs is None and outputs is None:
        return _nearest(left / step, limit)
    q = torch.empty_like(left)
    along, down = (_carried(gram, damping) for gram in (inputs, outputs))
    for start in range(0, left.shape[1], BLOCK):
        columns = slice(start, min(start + BLOCK, left.shape[1]))
        # Inside a block what is lost moves later columns one by one; those behind it, in one product.
        lost = _round_columns(left, q, step, limit, columns, along, down)
        if along is not None:
            left[:, columns.stop :] -= lost @ along[columns, columns.stop :]
    return q


def _nearest(x: torch.Tensor, limit: int) -> torch.Tensor:
    return x.round().clamp(-limit, limit)


def _round_columns(
    left: torch.Tensor,
    q: torch.Tensor,
    step: torch.Tensor,
    limit: int,
    columns: slice,
    along: torch.Tensor | None,
    down: torch.Tensor | None,
) -> torch.Tensor:
    """Round a block of columns in place; returns what each number lost, for the columns behind the block."""
    n = len(left)
    lost = torch.empty(n, columns.stop - columns.start, dtype=left.dtype, device=left.device)
    moved = torch.zeros_like(lost)  # by what was lost in earlier rows of the same column
    # Zeros where the inputs have nothing to do with each other: nothing moves to the right.
    right = lost.new_zeros(lost.shape[1], lost.shape[1]) if along is None else along[columns, columns]
    # Rows that have nothing to do with each other are one tile, however many.
    for start in range(0, n, BLOCK if down is not None else n):
        rows = slice(start, min(start + BLOCK, n) if down is not None else n)
        tile = left[rows, columns], q[rows, columns], step[rows, columns], lost[rows], moved[rows]
        if down is None:
            _round_tile_by_columns(*tile, limit, right)
        else:
            missed = _round_tile(*tile, limit, right, down[rows, rows])
            moved[rows.stop :] -= down[rows, rows.stop :].T @ missed
    return lost


def _round_tile_by_columns(
    left: torch.Tensor,
    q: torch.Tensor,
    step: torch.Tensor,
    lost: torch.Tensor,
    _: torch.Tensor,
    limit: int,
    right: torch.Tensor,
) -> None:
    """A tile whose rows have nothing to do with each other."""
    for j in range(left.shape[1]):
        q[:, j] = _nearest(left[:, j] / step[:, j], limit)
        lost[:, j] = left[:, j] - q[:, j] * step[:, j]
        left[:, j + 1 :] -= lost[:, j, None] * right[j, j + 1 :]


def _round_tile(
    left: torch.Tensor,
    q: torch.Tensor,
    step: torch.Tensor,
    lost: torch.Tensor,
    moved: torch.Tensor,
    limit: int,
    right: torch.Tensor,
    below: torch.Tensor,
) -> torch.Tensor:
    """A tile `[a, b]` whose rows depend on each other as its columns do: an antidiagonal at a time, since a
    number needs only those left of it and those above. Returns what each missed of what its column asked for.
    """
    a, b = left.shape
    missed = torch.empty_like(lost)
    for d in range(a + b - 1):
        i = torch.arange(max(0, d - b + 1), min(a - 1, d) + 1, device=left.device)
        j = d - i
        rows, columns = slice(int(i[0]), int(i[-1]) + 1), slice(int(j[-1]), int(j[0]) + 1)
        wanted, size = left[i, j] + moved[i, j], step[i, j]
        value = _nearest(wanted / size, limit)
        q[i, j] = value
        value = value * size
        lost[i, j], missed[i, j] = left[i, j] - value, wanted - value
        # Triangles: what lies at or before the number itself is not touched.
        left[rows] -= lost[i, j][:, None] * right[j]
        # flip: along an antidiagonal j falls as i rises, and a slice of columns rises.
        moved[:, columns] -= (missed[i, j][:, None] * below[i]).T.flip(1)
    return missed


def _carried(gram: torch.Tensor | None, damping: float) -> torch.Tensor | None:
    """Strictly upper triangular `[m, m]`: by how much of a number's loss each later one is to move (row i:
    the coefficients of the regression of later entries on entry i, given those before)."""
    if gram is None:
        return None
    # The upper Cholesky factor of C^-1, its rows over their diagonals, is all of these regressions (GPTQ).
    upper = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(_damped(gram, damping))), upper=True
    )
    # Factorised in fp64, which the condition of C asks for; applied in fp32, which is far finer than the
    # rounding.
    return (upper / upper.diagonal()[:, None]).triu(1).float()


def refit(second: torch.Tensor, cross: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The S' `[out, R]` that brings S' z' nearest to S z, S = `second`, over inputs with E[z z'^T] = `cross`
    and E[z' z'^T] = `gram`: S cross gram^-1. Where rounding made z' = z / 2 (E[z^2] = 1), S' is 2 S:

    >>> half, quarter = torch.tensor([[0.5]]).double(), torch.tensor([[0.25]]).double()
    >>> refit(torch.tensor([[3.0]]), cross=half, gram=quarter).round(decimals=3).tolist()
    [[6.0]]
    """
    solved = torch.linalg.solve(_damped(gram, DAMPING), (second.double() @ cross).T)
    return solved.T.to(second.dtype)


def _damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    gram = gram.double()
    scale = damping * gram.diagonal().mean().clamp_min(1e-30)
    return gram + scale * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
