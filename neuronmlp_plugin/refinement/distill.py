"""End to end: the factors learn the dense model's next-token distribution (or, as in the paper, the text
itself).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from neuronmlp_plugin.calibration.output_loss import kl_gradient, next_token_gradient
from neuronmlp_plugin.calibration.quality import last_hidden
from neuronmlp_plugin.calibration.stream import LayerStream
from neuronmlp_plugin.compressor.workspace import Workspace
from neuronmlp_plugin.refinement.arithmetic import products
from neuronmlp_plugin.refinement.descent import descend
from neuronmlp_plugin.refinement.settings import RefineSettings
from neuronmlp_plugin.refinement.trainable import trainable

Tick = Callable[[int], None]


def teacher_states(
    dense: LayerStream, windows: torch.Tensor, settings: RefineSettings, tick: Tick
) -> torch.Tensor:
    """What the dense model's output matrix sees, `[n, S, H]` bf16: small enough to keep, where its logits are
    not.
    """
    with products(settings.arithmetic):
        hidden = last_hidden(dense, windows, tick)
    norm, _ = dense.head()
    return torch.cat([norm(batch).bfloat16() for batch in hidden.split(8)])


def distill(
    student: Any,
    teacher: torch.Tensor | None,
    windows: torch.Tensor,
    rate: float,
    settings: RefineSettings,
    files: Workspace,
    tick: Tick,
) -> list[float]:
    """Train the factors of a Hugging Face model in place over `windows [n, S]`, each once; returns the loss
    of every step, per token.

    `teacher`: `teacher_states` of the same windows, or None for the next-token loss. `files` keeps what an
    interrupted run goes on from; `tick(1)` after each step.
    """
    head = student.lm_head.weight.detach()
    head = head.bfloat16() if settings.arithmetic == "bfloat16" else head

    def step(ids: torch.Tensor, states: torch.Tensor | None) -> float:
        with products(settings.arithmetic):
            hidden = student.model(input_ids=ids, use_cache=False).last_hidden_state
        if states is None:
            hidden, targets = hidden[:, :-1], ids[:, 1:].flatten()
            rows = hidden.flatten(0, 1)
            loss, gradient = next_token_gradient(rows.detach(), targets, head)
        else:
            rows = hidden.flatten(0, 1)
            loss, gradient = kl_gradient(rows.detach(), states.flatten(0, 1), head)
        rows.backward(gradient / len(rows))
        return loss / len(rows)

    parts = [slice(start, start + settings.batch) for start in range(0, len(windows), settings.batch)]
    steps = [
        functools.partial(step, windows[part], None if teacher is None else teacher[part]) for part in parts
    ]
    with trainable(student.model, settings.adapter_rank) as parameters:
        return descend(parameters, rate, steps, files, tick)
