"""How good a model is next to its dense original, on held-out text: perplexity, KL divergence, top-1
agreement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from neuronmlp_plugin.calibration.statistics import run_in_place
from neuronmlp_plugin.calibration.stream import LayerStream
from neuronmlp_plugin.errors import NonFiniteError

# whose logits are in memory at a time: 33 MB in fp32 for 128256 tokens; larger pieces cost the kernel's page
# faults
POSITIONS = 64


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

    def to_json(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), "perplexity_ratio": self.perplexity_ratio}


def compare(
    reference: LayerStream,
    candidate: LayerStream,
    windows: torch.Tensor,
    tick: Callable[[int], None] = lambda _: None,
) -> Quality:
    """One candidate against the reference over `windows [n, S]`; `Judge` says how."""
    return Judge(reference, windows, tick).compare(candidate, tick)


class Judge:
    """Compares candidates with a reference that runs once, over all predicted tokens of `windows [n, S]`.

    One layer of one model is in memory at a time; `tick(1)` after each of any model's layers. A window with
    NaN or Inf logits ends the run with NonFiniteError: skipping it would make a broken model look finite.
    """

    def __init__(
        self, reference: LayerStream, windows: torch.Tensor, tick: Callable[[int], None] = lambda _: None
    ) -> None:
        self.reference, self.windows = reference, windows
        self._exact = last_hidden(reference, windows, tick)

    @torch.no_grad()
    def compare(self, candidate: LayerStream, tick: Callable[[int], None] = lambda _: None) -> Quality:
        """Averages over all windows."""
        reached = last_hidden(candidate, self.windows, tick)
        head_p, head_q = self.reference.head(), candidate.head()
        totals = _Totals()
        for index, (window, *pair) in enumerate(zip(self.windows, self._exact, reached, strict=True)):
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
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(f"{where}: expected finite logits, found NaN or Inf; the model is broken.")
    return logits.float().log_softmax(-1)
