"""How good a model is next to its dense original, on held-out text: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from neuronmlp_plugin.errors import NonFiniteError


@dataclasses.dataclass(frozen=True)
class Quality:
    """Over `num_tokens` predicted tokens. KL is in nats per token, KL(reference || candidate); agreement is of the argmax."""

    reference_perplexity: float
    candidate_perplexity: float
    kl_divergence: float
    top1_agreement: float
    num_tokens: int

    @property
    def perplexity_ratio(self) -> float:
        return self.candidate_perplexity / self.reference_perplexity

    def to_json(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), "perplexity_ratio": self.perplexity_ratio}


@torch.no_grad()
def compare(reference: Any, candidate: Any, windows: torch.Tensor, tick: Callable[[int], None] = lambda _: None) -> Quality:
    """Run both Hugging Face models over `windows [n, S]`, one window at a time, and average over all predicted tokens.

    A window with NaN or Inf logits ends the run with NonFiniteError: skipping it would make a broken model look finite.
    """
    losses = torch.zeros(2, dtype=torch.float64)
    kl, agreed, count = 0.0, 0, 0
    for index, window in enumerate(windows):
        log_p, log_q = (_log_probabilities(model, window, index) for model in (reference, candidate))
        targets = window[1:]
        losses += torch.stack([F.nll_loss(log, targets, reduction="sum").double() for log in (log_p, log_q)])
        kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
        agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        count += len(targets)
        tick(1)
    reference_loss, candidate_loss = (losses / count).tolist()
    return Quality(math.exp(reference_loss), math.exp(candidate_loss), kl / count, agreed / count, count)


def _log_probabilities(model: Any, window: torch.Tensor, index: int) -> torch.Tensor:
    logits = model(window[None]).logits[0, :-1].float()
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(f"{type(model).__name__}: expected finite logits, found NaN or Inf in window {index}; the model is broken.")
    return logits.log_softmax(-1)
