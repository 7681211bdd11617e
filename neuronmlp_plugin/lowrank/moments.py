"""Streamed second moments: E[x x^T] of the rows that a projection sees."""

from __future__ import annotations

import torch

from neuronmlp_plugin.errors import CalibrationError, NonFiniteError


class SecondMoment:
    """Accumulates sum of x x^T in fp64 over batches of rows, with their count; a sum of batches equals one big batch.

    The products are taken in the input's own precision (fp32) per batch, and only their sum is fp64: that is where the error of a long
    stream would build up, and it keeps the cost at that of an fp32 matmul.
    """

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size, size, dtype=torch.float64)
        self.count = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add rows `[n, size]`. Raises NonFiniteError for NaN or Inf."""
        product = rows.T @ rows
        if not bool(torch.isfinite(product).all()):
            raise NonFiniteError("calibration activations: expected finite values, found NaN or Inf; check the model's dtype and weights.")
        self.total += product
        self.count += rows.shape[0]

    def mean(self) -> torch.Tensor:
        """E[x x^T] `[size, size]`, fp64. Raises CalibrationError when nothing was added."""
        if self.count == 0:
            raise CalibrationError("calibration: expected at least one token, found none; give more text.")
        return self.total / self.count
