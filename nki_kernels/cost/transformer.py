"""A whole transformer around the MLP, so that a kernel's gain is shown end to end. Simulated: MLPs by their
kernels, the rest by formulas.

The rest, per core of `tp`, each part the larger of its FLOPs at the rate of TensorE's widest matmuls and
its HBM bytes at the long-row DMA rate:

    attention projections   2 T P FLOPs, P weights        P = H (2 heads + 2 kv_heads) head_dim, sharded
    attention               4 T C heads head_dim FLOPs (half of it in a causal prefill); K and V of C tokens
    per sequence
    norms                   two per layer, three ScalarE passes over T H elements on 128 lanes
    lm_head                 one token per sequence, H x vocabulary, sharded
    collectives             one all-reduce of [T, H] per layer behind attention, and those of the MLP

Nothing overlaps, and what the framework adds is not modelled; both make the share of the MLP, and so Amdahl's
bound, an upper one at best.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from nki_kernels.cost.constants import Constants
from nki_kernels.cost.mlp_forms import Blend
from nki_kernels.cost.models import ModelShape
from nki_kernels.cost.tensor_parallel import Setting, mlp_time
from nki_kernels.targets import PMAX, TURNAROUND_CYCLES, Target
from nki_kernels.tiling import MOVING_COLS

BF16 = np.dtype(ml_dtypes.bfloat16)
BYTES = 2  # of a bf16 element
LONG_ROW_BYTES = 8192  # rows of weights packed offline
NORM_PASSES = 3


@dataclasses.dataclass(frozen=True)
class Step:
    """`sequences` sequences each add `new` tokens to a context that is then `context` tokens long: a prefill,
    or one decode step.
    """

    sequences: int
    new: int
    context: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.new


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where the time of one step goes, in us, over all layers; simulated."""

    mlp: float
    mlp_collectives: float
    attention: float
    attention_collectives: float
    norms: float
    lm_head: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    @property
    def mlp_share(self) -> float:
        """Share of the step that the MLPs take, their collectives included."""
        return (self.mlp + self.mlp_collectives) / self.total


def amdahl(mlp_share: float, mlp_speedup: float = float("inf")) -> float:
    """Speed-up of the whole when a share of it runs `mlp_speedup` times faster; at infinity, the bound."""
    return 1 / (1 - mlp_share + mlp_share / mlp_speedup)


class _Core:
    """Roofline of one core."""

    def __init__(self, target: Target, constants: Constants) -> None:
        self.target = target
        engine = target.dma_achieved_gbps / target.dma_engines
        self.bytes_per_us = (
            1000 * target.dma_engines * LONG_ROW_BYTES / constants.descriptor_ns(LONG_ROW_BYTES, engine)
        )
        working = MOVING_COLS / (MOVING_COLS + TURNAROUND_CYCLES)  # of the cycles of the widest matmuls
        self.flops_per_us = 2 * PMAX * PMAX * target.tensor_ghz * 1000 * working

    def us(self, flops: float, size_bytes: float) -> float:
        return max(flops / self.flops_per_us, size_bytes / self.bytes_per_us)

    def norm_us(self, tokens: int, hidden: int) -> float:
        return NORM_PASSES * -(-tokens // PMAX) * hidden / self.target.scalar_ghz / 1000


def attention_us(shape: ModelShape, step: Step, tp: int, core: _Core) -> float:
    """Projections, scores and values of one layer on one core of `tp`."""
    # With more cores than KV heads, cores hold copies of one.
    heads, kv_heads = max(1, shape.heads // tp), max(1, shape.kv_heads // tp)
    weights = shape.hidden * shape.head_dim * 2 * (heads + kv_heads)
    projections = core.us(2 * step.tokens * weights, weights * BYTES)
    causal = 0.5 if step.new == step.context else 1.0
    flops = 4 * step.tokens * step.context * heads * shape.head_dim * causal
    cache = 2 * step.sequences * step.context * kv_heads * shape.head_dim * BYTES
    return projections + core.us(flops, cache)


def step_time(shape: ModelShape, mlp: Blend, step: Step, setting: Setting) -> Parts:
    """One step of the whole model with MLPs as `mlp` says. Raises ValueError where one has no plan."""
    core, tp = _Core(setting.target, setting.constants), setting.tp
    time = mlp_time(mlp, shape.hidden, step.tokens, BF16, setting)
    head = shape.hidden * shape.vocabulary / tp
    reduce = setting.collectives.all_reduce_us(step.tokens * shape.hidden * BYTES, tp, setting.target)
    return Parts(
        mlp=shape.layers * time.kernels_us,
        mlp_collectives=shape.layers * time.collectives_us,
        attention=shape.layers * attention_us(shape, step, tp, core),
        attention_collectives=shape.layers * reduce,
        norms=(2 * shape.layers + 1) * core.norm_us(step.tokens, shape.hidden),
        lm_head=core.us(2 * step.sequences * head, head * BYTES),
    )
