"""Streamed second moments: E[x x^T] of the rows that a projection sees."""

from __future__ import annotations

import torch

from neuronmlp_plugin.errors import CalibrationError, NonFiniteError

# Rows of the moment that are worked on at a time. At I = 14336 the moment is 1.6 GB in fp64, and no second
# matrix of that size may exist.
BLOCK = 2048


class SecondMoment:
    """Accumulates sum of x x^T in fp64 over batches of rows, with their count; a sum of batches equals one
    big batch.

    The products are taken in the input's own precision (fp32) per batch, and only their sum is fp64: that is
    where the error of a long stream would build up, and it keeps the cost at that of an fp32 matmul. Only the
    lower triangle of blocks is computed.
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self.total = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add rows `[n, size]`. Raises NonFiniteError for NaN or Inf."""
        for start in range(0, len(self.total), BLOCK):
            end = min(start + BLOCK, len(self.total))
            product = rows[:, start:end].T @ rows[:, :end]
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
        for start in range(0, len(mean), BLOCK):
            mean[:start, start : start + BLOCK] = mean[start : start + BLOCK, :start].T
        return mean


def all_finite(tensor: torch.Tensor) -> bool:
    """True without NaN or Inf; unlike `torch.isfinite` it makes no copy of the tensor."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(end)) for end in tensor.aminmax())
