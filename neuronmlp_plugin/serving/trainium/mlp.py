"""The gated MLP that takes the place of NxDI's `NeuronLlamaMLP`: its contract, and the choice between kernels
and torch by phase.

Every tensor-parallel MLP ends with a sum of y over the ranks: an all-reduce, or under sequence parallelism a
reduce-scatter along the sequence. What else a path communicates stands in torch_path.py and kernel_path.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from neuronmlp_plugin.models.factors import MLPLayer
from neuronmlp_plugin.serving.trainium.dispatch import DECODE, PREFILL, RECORD, Decision
from neuronmlp_plugin.serving.trainium.kernel_path import KernelPath
from neuronmlp_plugin.serving.trainium.parallel import Parallel
from neuronmlp_plugin.serving.trainium.torch_path import TorchPath

SEQUENCE_DIM = 1


class LowRankMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` of one rank, under NxDI's contract for an MLP.

    x is `[B, S, H]`, or `[B, S / tp, H]` under sequence parallelism, and so is the result. `decisions` says
    by phase which path to take; the weights of a path that no phase takes are not allocated. `prefill` is
    None in a module that serves both phases.
    """

    def __init__(
        self,
        stored: MLPLayer,
        parallel: Parallel,
        decisions: Mapping[str, Decision],
        sequence_parallel: bool = False,
        prefill: bool | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        paths = {decision.path for decision in decisions.values()}
        self.torch_path = TorchPath(stored, parallel) if "torch" in paths else None
        self.kernel_path = KernelPath(stored, parallel) if "kernel" in paths else None
        self.parallel, self.decisions = parallel, decisions
        self.sequence_parallel, self.prefill, self.layer = sequence_parallel, prefill, layer

    def forward(
        self,
        x: torch.Tensor,
        rmsnorm: Callable[[torch.Tensor], torch.Tensor] | None = None,
        residual: torch.Tensor | None = None,
        adapter_ids: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(y, residual)`. A given residual is added to x first and the sum returned; `adapter_ids` is
        unused, since LoRA is refused.
        """
        if residual is not None:
            x = residual = residual + x
        if self.sequence_parallel:
            x = self.parallel.gather(x if rmsnorm is None else rmsnorm(x), SEQUENCE_DIM)
            rmsnorm = None
        y = self._summand(x, rmsnorm)
        y = (
            self.parallel.scatter_sum(y, SEQUENCE_DIM)
            if self.sequence_parallel
            else self.parallel.all_reduce(y)
        )
        return y, residual

    def _summand(
        self, x: torch.Tensor, rmsnorm: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> torch.Tensor:
        """This rank's summand of y, from the whole x `[B, S, H]`, by the path that was decided for the
        phase.
        """
        prefill = x.shape[1] > 1 if self.prefill is None else self.prefill
        phase = PREFILL if prefill else DECODE
        decision = self.decisions[phase]
        RECORD.add(self.layer, phase, x.shape[0] * x.shape[1], decision)
        if decision.path == "kernel":
            assert self.kernel_path is not None
            return self.kernel_path(x, rmsnorm)
        assert self.torch_path is not None
        return self.torch_path(x if rmsnorm is None else rmsnorm(x))
