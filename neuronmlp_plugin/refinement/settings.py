"""What a user may choose about a refinement, checked once."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

from neuronmlp_plugin.compressor.settings import check_seed
from neuronmlp_plugin.errors import UsageError

STAGES = ("blocks", "distill")
LOSSES = ("kl", "next-token")
RATE = 6e-5  # what did best at a divergence of one nat a token; 2e-5 to 3e-5 did at a third, 1e-5 at a tenth
ARITHMETIC = ("auto", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class RefineSettings:
    """One refinement of the folder `model`, made from `dense`; everything but `out` decides the result."""

    model: pathlib.Path
    dense: pathlib.Path
    text: pathlib.Path  # .txt or .jsonl, as for `compress`; its end judges and is never trained on
    out: pathlib.Path
    stages: tuple[str, ...] = (
        "distill",
    )  # in order: blocks (S5, layer by layer) | distill (the whole model)
    loss: str = "kl"  # of distill: KL(dense || compressed) | the next token of the text (the paper's)
    # 0 moves the factors themselves; r trains a LoRA of rank r on each factor and merges it (less memory)
    adapter_rank: int = 0
    learning_rate: float | None = None  # of Adam, at its highest; None: `rate_for`
    # trained on, once each: what brings a fifth removed below 1.20 of the dense perplexity (docs/quality.md)
    tokens: int = 262144
    window: int = 256  # tokens per training window: attention is dear on a CPU
    batch: int = 4  # windows per step: small steps, since few tokens are seen
    judge_tokens: int = 8192  # from the end of the text, in windows of 1024
    arithmetic: str = (
        "auto"  # of the matrix products (refinement/arithmetic.py); the factors and their sums stay fp32
    )
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values, allowed in (
            ("stages", self.stages, STAGES),
            ("loss", (self.loss,), LOSSES),
            ("arithmetic", (self.arithmetic,), ARITHMETIC),
        ):
            wrong = [value for value in values if value not in allowed]
            if wrong or not values or len(set(values)) < len(values):
                raise UsageError(
                    f"--{name}: expected distinct values of {', '.join(allowed)}, found {', '.join(values) or 'none'}."
                )
        for name in ("tokens", "window", "batch", "judge_tokens", "learning_rate"):
            if (found := getattr(self, name)) is not None and not 0 < found < math.inf:
                raise UsageError(f"--{name.replace('_', '-')}: expected a positive number, found {found}.")
        check_seed(self.seed)
        if self.adapter_rank < 0:
            raise UsageError(f"--adapter-rank: expected 0 or a positive number, found {self.adapter_rank}.")

    def rate_for(self, divergence: float) -> float:
        """The learning rate for a model `divergence` nats a token away from the dense one: what was asked
        for, or one that follows it.

        Adam moves every number by the rate, however small its gradient: near the dense model that noise
        outweighs what there is to gain.
        """
        return self.learning_rate or RATE * min(1.0, divergence) ** 0.75

    def describe(self) -> str:
        """In a few words."""
        moves = (
            f"LoRA of rank {self.adapter_rank} on every factor"
            if self.adapter_rank
            else "the factors themselves"
        )
        words = {
            "blocks": "layer by layer against the dense layer",
            "distill": f"end to end, loss {self.loss}",
        }
        return f"{'; then '.join(words[stage] for stage in self.stages)}; {moves}"

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "out"}
        values["stages"] = list(self.stages)
        return {
            key: str(value) if isinstance(value, pathlib.Path) else value for key, value in values.items()
        }
