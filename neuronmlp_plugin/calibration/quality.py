"""How good a model is next to its dense original, on held-out text: perplexity, KL divergence, top-1
agreement. And the losses that say so, with their gradient taken by hand and in pieces: logits of all
positions would fill the memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from neuronmlp_plugin.calibration.layer_stream import LayerStream
from neuronmlp_plugin.calibration.statistics import run_in_place
from neuronmlp_plugin.errors import NonFiniteError
from neuronmlp_plugin.lowrank.decompose import all_finite

# whose logits are in memory at a time: 33 MB in fp32 for 128256 tokens; larger pieces cost the kernel's page
# faults
POSITIONS = 64


# how each number is written, wherever it is told
_WRITTEN = {
    "reference_perplexity": "{:.2f}",
    "candidate_perplexity": "{:.2f}",
    "perplexity_ratio": "x {:.4f}",
    "kl_divergence": "{:.4f}",
    "top1_agreement": "{:.1%}",
}


@dataclasses.dataclass(frozen=True)
class Quality:
    """Over `num_tokens` predicted tokens. KL is in nats per token, KL(reference || candidate); agreement is
    of the argmax.
    """

    reference_perplexity: float
    candidate_perplexity: float
    kl_divergence: float
    top1_agreement: float
    num_tokens: int

    @property
    def perplexity_ratio(self) -> float:
        return self.candidate_perplexity / self.reference_perplexity

    @classmethod
    def of(cls, found: Mapping[str, Any] | None) -> Quality | None:
        """From JSON; None stays None. Raises KeyError or TypeError where a number is missing."""
        if found is None:
            return None
        numbers = {field.name: found[field.name] for field in dataclasses.fields(cls)}
        if not all(isinstance(number, (int, float)) for number in numbers.values()):
            raise TypeError(f"expected numbers, found {numbers}")
        return cls(**numbers)

    def to_json(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), "perplexity_ratio": self.perplexity_ratio}

    def written(self, name: str) -> str:
        """One of the numbers as text: `x 1.0165`, `91.7%`."""
        return _WRITTEN[name].format(getattr(self, name))

    @property
    def perplexities(self) -> str:
        return f"{self.written('candidate_perplexity')} against {self.written('reference_perplexity')} dense"

    def __str__(self) -> str:
        """The three measures in a line."""
        ratio, kl, top1 = map(self.written, ("perplexity_ratio", "kl_divergence", "top1_agreement"))
        return f"perplexity {ratio} ({self.perplexities}), KL {kl} nats a token, {top1} of the top tokens"


class Judge:
    """Compares candidates with a reference that runs once, over all predicted tokens of `windows [n, S]`; not
    at all where `exact`, its `last_hidden` there, is known.

    One layer of one model is in memory at a time; `tick(1)` after each of any model's layers. A window with
    NaN or Inf logits ends the run with NonFiniteError: skipping it would make a broken model look finite.
    """

    def __init__(
        self,
        reference: LayerStream,
        windows: torch.Tensor,
        tick: Callable[[int], None] = lambda _: None,
        exact: torch.Tensor | None = None,
    ) -> None:
        self.reference, self.windows = reference, windows
        self._exact = last_hidden(reference, windows, tick) if exact is None else exact

    @torch.no_grad()
    def compare(self, candidate: LayerStream, tick: Callable[[int], None] = lambda _: None) -> Quality:
        """Averages over all windows."""
        reached = last_hidden(candidate, self.windows, tick)
        head_p, head_q = self.reference.head(), candidate.head()
        totals = _Totals()
        for index, (window, *pair) in enumerate(zip(self.windows, self._exact, reached, strict=True)):
            # The last position predicts a token that is not in the window.
            targets, p, q = (x.split(POSITIONS) for x in (window[1:], *(hidden[:-1] for hidden in pair)))
            for target, x, y in zip(targets, p, q, strict=True):
                device = self.reference.device
                totals.add(
                    head_p(x.to(device)), head_q(y.to(candidate.device)), target.to(device), f"window {index}"
                )
        return totals.quality()


def last_hidden(stream: LayerStream, windows: torch.Tensor, tick: Callable[[int], None]) -> torch.Tensor:
    """What the final norm sees, `[n, S, H]` on the CPU."""
    hidden = stream.embed(windows)
    for index in range(stream.num_layers):
        layer = stream.load(index)
        run_in_place(stream, layer, hidden)
        stream.release(index)
        tick(1)
    return hidden


class _Totals:
    """Sums over the tokens seen so far."""

    def __init__(self) -> None:
        self.losses, self.kl, self.agreed, self.count = [0.0, 0.0], 0.0, 0, 0

    def add(
        self, reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor, where: str
    ) -> None:
        """Logits `[n, vocabulary]` of both models for the tokens `targets [n]`."""
        log_p = _log_probabilities(reference, f"dense model, {where}")
        log_q = _log_probabilities(candidate, f"judged model, {where}")
        for model, log in enumerate((log_p, log_q)):
            self.losses[model] += float(F.nll_loss(log, targets, reduction="sum"))
        self.kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
        self.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.count += len(targets)

    def quality(self) -> Quality:
        reference, candidate = (math.exp(loss / self.count) for loss in self.losses)
        return Quality(reference, candidate, self.kl / self.count, self.agreed / self.count, self.count)


def _log_probabilities(logits: torch.Tensor, where: str) -> torch.Tensor:
    if not all_finite(logits):
        raise NonFiniteError(f"{where}: expected finite logits, found NaN or Inf; the model is broken.")
    return logits.float().log_softmax(-1)


# Logits in memory at a time, as numbers: 16 MB in fp32, which glibc keeps for the next piece instead of
# asking the kernel for fresh pages.
LOGITS = 2**22
LOGITS_GPU = 2**27  # half a gigabyte: a GPU is idle on smaller ones
NO_TARGET = -1


@torch.no_grad()
def kl_gradient(
    hidden: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """`(sum of KL(p || q), its gradient by hidden [n, H])` for q = softmax(hidden head^T), p =
    softmax(teacher head^T).

    `head [vocabulary, H]`, in whose dtype the products are taken. The gradient by the logits is q - p.
    """
    total, gradients = 0.0, []
    for h, t in zip(*(x.split(_positions(head)) for x in (hidden, teacher)), strict=True):
        log_q, log_p = (F.linear(x.to(head.dtype), head).float().log_softmax(-1) for x in (h, t))
        p = log_p.exp()
        total += float((p * (log_p - log_q)).sum())
        # dKL/dlogits = q - p, in the place of log q; then back through logits = hidden head^T.
        gradients.append((log_q.exp_().sub_(p).to(head.dtype) @ head).float())
    return total, torch.cat(gradients)


@torch.no_grad()
def mixed_gradient(
    hidden: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, head: torch.Tensor, share: float
) -> tuple[float, torch.Tensor]:
    """`(sum of (1 - share) KL(p || q) + share (cross entropy of the target), its gradient by hidden [n, H])`.

    `targets [n]`: the token ids that the text has next, NO_TARGET where it ends: there KL counts whole. The
    gradient by the logits is q - ((1 - share) p + share onehot(target)).
    """
    total, gradients = 0.0, []
    for h, t, ids in zip(*(x.split(_positions(head)) for x in (hidden, teacher, targets)), strict=True):
        log_q, log_p = (F.linear(x.to(head.dtype), head).float().log_softmax(-1) for x in (h, t))
        weight = share * (ids != NO_TARGET)[:, None]
        # NO_TARGET is no place in the vocabulary; its weight is 0, so any place will do.
        following = ids.clamp_min(0)[:, None]
        p = log_p.exp()
        parts = (1 - weight) * (p * (log_p - log_q)).sum(-1, keepdim=True)
        total += float((parts - weight * log_q.gather(1, following)).sum())
        p.mul_(1 - weight).scatter_add_(1, following, weight.to(p.dtype))
        gradients.append((log_q.exp_().sub_(p).to(head.dtype) @ head).float())
    return total, torch.cat(gradients)


@torch.no_grad()
def next_token_gradient(
    hidden: torch.Tensor, targets: torch.Tensor, head: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """`(sum of cross entropies, its gradient by hidden [n, H])` for the token ids `targets [n]`."""
    total, gradients = 0.0, []
    for h, ids in zip(*(x.split(_positions(head)) for x in (hidden, targets)), strict=True):
        log_q = F.linear(h.to(head.dtype), head).float().log_softmax(-1)
        total += float(F.nll_loss(log_q, ids, reduction="sum"))
        q = log_q.exp_()
        q[torch.arange(len(ids)), ids] -= 1.0
        gradients.append((q.to(head.dtype) @ head).float())
    return total, torch.cat(gradients)


def _positions(head: torch.Tensor) -> int:
    return max(1, (LOGITS_GPU if head.is_cuda else LOGITS) // len(head))
