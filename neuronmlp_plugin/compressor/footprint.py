"""The memory of a run, counted before it starts: the large tensors of each stage (docs/scale.md lists them at
8B).

No term has the number of layers in it; tests/compressor/test_scale.py holds the sums against what real runs
take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence

from neuronmlp_plugin.calibration.quality import POSITIONS
from neuronmlp_plugin.calibration.statistics import BATCH
from neuronmlp_plugin.lowrank.decompose import BLOCK
from neuronmlp_plugin.models.factors import MLPShape

_FP32, _FP64 = 4, 8
PROCESS_BYTES = 500 * 10**6  # Python with torch and transformers, before any tensor


# Where a container's limit stands: control groups version 2, then 1.
LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_bytes(limit_files: Sequence[str] = LIMIT_FILES) -> int:
    """Memory of this machine, or what the container that we run in may take of it."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in limit_files:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            sizes.append(int(pathlib.Path(name).read_text(encoding="ascii")))
    return min(sizes)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What the memory of a run depends on; counts of tokens, and of the parameters of one whole layer."""

    shape: MLPShape
    layer_parameters: int
    vocabulary: int
    window: int
    calibration_tokens: int
    metric_tokens: int
    measured_tokens: int
    judge_tokens: int
    removes_channels: bool

    def stages(self) -> dict[str, int]:
        """Peak bytes of each stage."""
        parts = {
            "backward pass": max(self._loss(), self._backward()) if self.metric_tokens else 0,
            "statistics": self._hidden(self.calibration_tokens + self.judge_tokens)
            + self._layer()
            + self._moments()
            + self._forward(),
            "channels and ranks": self._offers(),
            "measured gains": self._measured() if self.measured_tokens else 0,
            "pivots": self._pivots(),
            "quality": self._judge() if self.judge_tokens else 0,
        }
        return {name: PROCESS_BYTES + size for name, size in parts.items()}

    def room_for_layers(self) -> int:
        """What the peak leaves to layers that stay loaded while texts are continued, beside the output
        matrix.
        """
        output = self.vocabulary * self.shape.hidden_size * _FP32
        return max(self.stages().values()) - PROCESS_BYTES - output

    def _hidden(self, tokens: int) -> int:
        return tokens * self.shape.hidden_size * _FP32

    def _layer(self) -> int:
        return self.layer_parameters * _FP32

    def _batch(self, tokens: int, wide: int, narrow: int) -> int:
        """Activations of one batch: so many `[t, I]` and `[t, H]`."""
        width = wide * self.shape.intermediate_size + narrow * self.shape.hidden_size
        return min(tokens, BATCH * self.window) * width * _FP32

    def _loss(self) -> int:
        """Input and gradient of all windows, the output matrix, and three times the logits of one window."""
        return (
            2 * self._hidden(self.metric_tokens)
            + self.vocabulary * (self.shape.hidden_size + 3 * self.window) * _FP32
        )

    def _backward(self) -> int:
        metric = 2 * self.shape.hidden_size**2 * _FP64
        return (
            2 * self._hidden(self.metric_tokens)
            + self._layer()
            + self._batch(self.metric_tokens, 6, 16)
            + metric
        )

    def _moments(self) -> int:
        h, i = self.shape.hidden_size, self.shape.intermediate_size
        return (h * h + i * i) * _FP64 if self.calibration_tokens else 0

    def _forward(self) -> int:
        return self._batch(self.calibration_tokens, 4, 8) + BLOCK * self.shape.intermediate_size * _FP32

    def _offers(self) -> int:
        """A layer with its moments; and the whitened rows of all three matrices with a product of their size,
        and slices at work. Where channels go, C_h^-1 and W^T G W in fp64, shrunk into copies; or, later, the
        layer of fewer channels too, and what all its sizes have from the whole one.
        """
        h, i = self.shape.hidden_size, self.shape.intermediate_size
        statistics = (3 * h * i + h * h + i * i) * _FP32 + 3 * h * h * _FP64
        if not self.removes_channels:
            return statistics + i * i * _FP32 + 9 * h * i * _FP32 + 3 * h * i * _FP64
        return statistics + max(4 * i * i * _FP64, i * i * _FP32 + 13 * h * i * _FP32 + 4 * h * i * _FP64)

    def _measured(self) -> int:
        """Hidden states of both models and a gradient, with the output matrix; or a layer of both, its
        weights and factors as they were chosen, and weight gradients.
        """
        h, i = self.shape.hidden_size, self.shape.intermediate_size
        factored = 3 * (h * i + (h + i) * min(h, i) // 2) * _FP32 + 2 * h * i * _FP64
        layers = (
            2 * self._layer() + 3 * h * i * _FP32 + max(factored, self._batch(self.measured_tokens, 6, 16))
        )
        return 3 * self._hidden(self.measured_tokens) + max(self.vocabulary * h * _FP32, layers)

    def _pivots(self) -> int:
        """At full rank: factors of three projections, a basis and what is projected out of it for each, and
        one QR at work.
        """
        h, i = self.shape.hidden_size, self.shape.intermediate_size
        return (3 * (h + i) + 6 * i + 2 * i) * min(h, i) * _FP64

    def _judge(self) -> int:
        """Hidden states and output matrices of both models, with six times some logits; or one layer at
        work.
        """
        heads = self.vocabulary * (2 * self.shape.hidden_size + 6 * POSITIONS) * _FP32
        return 2 * self._hidden(self.judge_tokens) + max(
            heads, self._layer() + self._batch(self.judge_tokens, 4, 8)
        )
