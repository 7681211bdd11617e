"""The best rank-k stand-in for a weight, for every k at once.

With W `[out, in]` (y = W x), input moment C = E[x x^T] and output metric G, the loss of W' is

    || G^1/2 (W - W') C^1/2 ||_F^2  =  E || G^1/2 (W - W') x ||^2,

whose minimum over rank-k matrices is the truncated SVD of G^1/2 W C^1/2 (Eckart-Young), mapped back. G = I
gives the whitening of SVD-LLM (2403.07378), G = C = I plain SVD; the two-sided form is that of GFWSVD /
KFAC-SVD (docs/method.md).

Nothing is inverted that can be singular: with in >= out only the small side G^1/2 W C W^T G^1/2 is formed,
and C enters as a product; with in < out C gets a relative ridge, below which input directions carry no energy
anyway. The moments are streamed: no row of text is kept.
"""

from __future__ import annotations

import dataclasses

import torch

from neuronmlp_plugin.errors import CalibrationError, NonFiniteError
from neuronmlp_plugin.lowrank.removal import ridged

# Rows of the moment that are worked on at a time. At I = 14336 the moment is 1.6 GB in fp64, and no second
# matrix of that size may exist.
BLOCK = 256


class SecondMoment:
    """Accumulates sum of x x^T in fp64 over batches of rows, with their count; a sum of batches equals one
    big batch.

    The products are taken in the input's own precision (fp32) per batch, and only their sum is fp64: that is
    where the error of a long stream would build up, and it keeps the cost at that of an fp32 matmul. Only the
    lower triangle of blocks is computed.

    >>> moment = SecondMoment(2)
    >>> moment.add(torch.tensor([[1.0, 2.0]])), moment.add(torch.tensor([[3.0, 0.0]]))
    (None, None)
    >>> moment.mean().tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self.total = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add rows `[n, size]`. Raises NonFiniteError for NaN or Inf."""
        for start in range(0, len(self.total), BLOCK):
            end = min(start + BLOCK, len(self.total))
            product = rows[:, start:end].T @ rows[:, :end]
            # Asked of the product: a row's NaN or Inf is in it, and so is an overflow that no row shows.
            if not all_finite(product):
                raise NonFiniteError(
                    "calibration activations: expected finite values, found NaN or Inf; check the model's "
                    "dtype and weights."
                )
            self.total[start:end, :end] += product
        self.count += rows.shape[0]

    def mean(self) -> torch.Tensor:
        """E[x x^T] `[size, size]`, fp64; takes the sum with it, so that there is one matrix. Raises
        CalibrationError when it is empty.
        """
        if self.count == 0:
            raise CalibrationError("calibration: expected at least one token, found none; give more text.")
        mean, self.total, self.count = self.total.div_(self.count), self.total.new_zeros(0, 0), 0
        # Only what lies on and below the diagonal of blocks was summed: the rest is its mirror.
        for start in range(0, len(mean), BLOCK):
            mean[:start, start : start + BLOCK] = mean[start : start + BLOCK, :start].T
        return mean


def all_finite(tensor: torch.Tensor) -> bool:
    """True without NaN or Inf; unlike `torch.isfinite` it makes no copy of the tensor."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(end)) for end in tensor.aminmax())


# Share of the mean diagonal that is added to C or G before a square root is inverted; relative, so that scale
# does not matter.
RIDGE = 1e-5


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """W as a sum of min(out, in) rank-one terms in order of worth; any prefix is the best factorisation of
    its rank.

    `left [out, r]`, `right [r, in]`, `energy [r]` (fp64, descending): the loss of dropping term j is
    `energy[j]`.
    """

    left: torch.Tensor
    right: torch.Tensor
    energy: torch.Tensor

    def tail(self) -> torch.Tensor:
        """`tail[k]`: loss of keeping the first k terms, for k = 0 ... r (`[r + 1]`, fp64)."""
        return tail_of(self.energy)

    def truncate(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(first [rank, in], second [out, rank])` with W' = second first, term by term of equal norm (fp16
        could overflow else).
        """
        second, first = self.left[:, :rank], self.right[:rank]
        # 1e-30: beyond its rank a matrix has terms of zeros, whose norms cannot be made equal.
        scale = (first.norm(dim=1) / second.norm(dim=0).clamp_min(1e-30)).sqrt().clamp_min(1e-30)
        return first / scale[:, None], second * scale


def tail_of(energy: torch.Tensor) -> torch.Tensor:
    """`[r + 1]`: what is left of `energy [r]` behind its first 0 ... r terms."""
    # From the smallest on: a small tail, taken as the difference of two large sums, would be all rounding.
    flipped = energy.flip(0).cumsum(0).flip(0)
    return torch.cat((flipped, flipped.new_zeros(1)))


def eigen_roots(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, D^1/2) of V D V^T, a symmetric matrix with a ridge, fp64."""
    values, vectors = torch.linalg.eigh(ridged(symmetric, RIDGE))
    # eigh errs by about 1e-16 of the largest value, so one near 0 may come out below it.
    return vectors, values.clamp_min(float(values[-1]) * 1e-14).sqrt()


@dataclasses.dataclass(frozen=True)
class MetricRoots:
    """G^1/2 and G^-1/2, each `[out]` or `[out, out]` fp64."""

    root: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, metric: torch.Tensor | None, weight: torch.Tensor) -> MetricRoots:
        """Of the output metric of `weight [out, in]`; None is the identity. Raises NonFiniteError."""
        _check_finite("output metric", metric)
        if metric is None:
            one = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
            return cls(one, one)
        g = metric.double()
        if g.ndim == 1:
            # The ridge: an output whose gradient was always 0 would have no inverse root.
            root = (g + RIDGE * g.mean().clamp_min(1e-30)).sqrt()
            return cls(root, 1.0 / root)
        vectors, root = eigen_roots(g)
        return cls((vectors * root) @ vectors.T, (vectors / root) @ vectors.T)


def decompose(
    weight: torch.Tensor,
    moment: torch.Tensor | None = None,
    metric: torch.Tensor | MetricRoots | None = None,
) -> Decomposition:
    """Decompose W `[out, in]` under C = `moment [in, in]` and G = `metric` (`[out]` diagonal or `[out,
    out]`, or its roots where many matrices share it); None is the identity.

    fp64 throughout. Raises NonFiniteError for NaN or Inf in any input.
    """
    _check_finite("weight", weight)
    _check_finite("input moment", moment)
    w = weight.double()
    roots = metric if isinstance(metric, MetricRoots) else MetricRoots.of(metric, w)
    return _from_outputs(w, moment, roots) if w.shape[0] <= w.shape[1] else _from_inputs(w, moment, roots)


def _check_finite(what: str, tensor: torch.Tensor | None) -> None:
    if tensor is not None and not all_finite(tensor):
        raise NonFiniteError(
            f"{what}: expected finite values, found NaN or Inf; the model or its statistics are damaged."
        )


def _from_outputs(w: torch.Tensor, moment: torch.Tensor | None, roots: MetricRoots) -> Decomposition:
    """in >= out: eigenvectors of (G^1/2 W) C (G^1/2 W)^T `[out, out]`."""
    # With A = G^1/2 W C^1/2 = V S U^T the best W' is G^-1/2 V V^T G^1/2 W: the root of C cancels, so a moment
    # of low rank does no harm and only the small side is ever decomposed.
    scaled = _apply(roots.root, w)
    energy, vectors = _descending_eigh(scaled @ (scaled.T if moment is None else moment.double() @ scaled.T))
    return Decomposition(_apply(roots.inverse, vectors), vectors.T @ scaled, energy)


def _from_inputs(w: torch.Tensor, moment: torch.Tensor | None, roots: MetricRoots) -> Decomposition:
    """in < out: with C = S S^T, eigenvectors of S^T W^T G W S `[in, in]`."""
    if moment is None:
        mapped, back = w, torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    else:
        # S = V D^1/2, not the symmetric root: any S with S S^T = C will do, and this one is inverted by a
        # division.
        vectors, spread = eigen_roots(moment)
        mapped, back = w @ (vectors * spread), (vectors / spread).T
    scaled = _apply(roots.root, mapped)
    energy, basis = _descending_eigh(scaled.T @ scaled)
    return Decomposition(mapped @ basis, basis.T @ back, energy)


def _apply(root: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return root[:, None] * matrix if root.ndim == 1 else root @ matrix


def _descending_eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # eigh reads one triangle alone, and those of a product differ in their last digits; values of 0 may come
    # out below it.
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return values.flip(0).clamp_min(0.0), vectors.flip(1)


def metric_norm(outputs: torch.Tensor, metric: torch.Tensor | None) -> float:
    """|| outputs G^1/2 ||_F of rows `[n, out]`; None is the identity."""
    y = outputs.double()
    if metric is None:
        return float(y.norm())
    g = metric.double()
    squared = (y.square() * g).sum() if g.ndim == 1 else (y @ g * y).sum()
    return float(squared.clamp_min(0.0).sqrt())
