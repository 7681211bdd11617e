"""A quality that a user asks for in place of a size: `ppl+2%`, `kl<0.05`, `top1>95%`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from neuronmlp_plugin.errors import UsageError

_FORMS = (
    (re.compile(r"ppl\+(\d+\.?\d*)%"), "perplexity_ratio"),
    (re.compile(r"kl<(\d+\.?\d*)"), "kl_divergence"),
    (re.compile(r"top1>(\d+\.?\d*)%"), "top1_agreement"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """`metric` is a key of `Quality.to_json`: agreement has to reach `bound`, a perplexity ratio or KL (nats
    a token) to stay within it.
    """

    metric: str
    bound: float

    def met(self, quality: Mapping[str, float]) -> bool:
        found = quality[self.metric]
        return found >= self.bound if self.metric == "top1_agreement" else found <= self.bound


def parse_target(text: str) -> Target:
    """Raises UsageError for what is none of the three, or bounds nothing (`kl<0`, `top1>100%`: only the dense
    model would do).
    """
    for pattern, metric in _FORMS:
        match = pattern.fullmatch(text.replace(" ", ""))
        if match is None:
            continue
        number = float(match[1])
        bound = {
            "perplexity_ratio": 1 + number / 100,
            "kl_divergence": number,
            "top1_agreement": number / 100,
        }[metric]
        if number > 0 and (metric != "top1_agreement" or bound < 1):
            return Target(metric, bound)
    raise UsageError(
        '--target: expected "ppl+2%", "kl<0.05" or "top1>95%" with a number that leaves room, found '
        f"{text!r}; quote it."
    )
