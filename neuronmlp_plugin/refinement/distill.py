"""End to end: the weights learn the dense model's next-token distribution, and a share of the text itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from neuronmlp_plugin.calibration.quality import (
    NO_TARGET,
    kl_gradient,
    last_hidden,
    mixed_gradient,
    next_token_gradient,
)
from neuronmlp_plugin.calibration.stream import LayerStream, best_device
from neuronmlp_plugin.compressor.job import Workspace
from neuronmlp_plugin.refinement.descent import descend, products, trainable
from neuronmlp_plugin.refinement.settings import RefineSettings

Tick = Callable[[int], None]


def teacher_states(
    dense: LayerStream, windows: torch.Tensor, settings: RefineSettings, tick: Tick
) -> torch.Tensor:
    """What the dense model's output matrix sees, `[n, S, H]` bf16: small enough to keep, where its logits are
    not.
    """
    with products(settings.arithmetic, dense.device):
        hidden = last_hidden(dense, windows, tick)
    norm, _ = dense.head()
    return torch.cat([norm(batch.to(dense.device)).bfloat16().cpu() for batch in hidden.split(8)])


def visits(windows: int, settings: RefineSettings) -> list[torch.Tensor]:
    """Which windows each step sees: all of them in a random order, then again in another, until `tokens` are
    seen.
    """
    wanted = max(1, settings.tokens // settings.window)
    generator = torch.Generator().manual_seed(settings.seed)
    rounds = [torch.randperm(windows, generator=generator) for _ in range(-(-wanted // windows))]
    return list(torch.cat(rounds)[:wanted].split(settings.batch))


def distill(
    student: Any,
    linears: Sequence[Any],
    teacher: torch.Tensor | None,
    windows: torch.Tensor,
    rate: float,
    share: float,
    settings: RefineSettings,
    files: Workspace,
    tick: Tick,
) -> list[float]:
    """Train the weights of `linears` of a Hugging Face model in place; returns the loss of every step, per
    token.

    `teacher`: `teacher_states` of `windows [n, S]`, or None for the next-token loss; `share`: that of the
    next token. `files` keeps what an interrupted run goes on from; `tick(1)` after each step.
    """
    device = best_device()
    student.to(device)
    head = student.lm_head.weight.detach()
    head = head.bfloat16() if settings.arithmetic == "bfloat16" else head

    def step(part: torch.Tensor) -> float:
        ids = windows[part].to(device)
        with products(settings.arithmetic, device):
            hidden = student.model(input_ids=ids, use_cache=False).last_hidden_state
        rows = (hidden if teacher is not None else hidden[:, :-1]).flatten(0, 1)
        states = None if teacher is None else teacher[part].to(device).flatten(0, 1)
        loss, gradient = _gradient(rows.detach(), states, ids, head, share)
        rows.backward(gradient / len(rows))
        return loss / len(rows)

    steps = [functools.partial(step, part) for part in visits(len(windows), settings)]
    with trainable(student, linears, settings.adapter_rank, settings.is_int8) as parameters:
        losses = descend(parameters, rate, steps, files, tick)
    student.to("cpu")
    return losses


def _gradient(
    rows: torch.Tensor, states: torch.Tensor | None, ids: torch.Tensor, head: torch.Tensor, share: float
) -> tuple[float, torch.Tensor]:
    """Of the loss by the last hidden states of the windows `ids [b, S]`: `rows [b S, H]`, or without `states`
    `[b (S - 1), H]`.
    """
    if states is None:
        return next_token_gradient(rows, ids[:, 1:].flatten(), head)
    if not share:
        return kl_gradient(rows, states, head)
    following = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], NO_TARGET)), dim=1)
    return mixed_gradient(rows, states, following.flatten(), head, share)
