"""What a user may choose about a refinement, checked once."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

from neuronmlp_plugin.compressor.settings import check_seed
from neuronmlp_plugin.errors import UsageError

STAGES = ("blocks", "distill")
LOSSES = ("mixed", "kl", "next-token")
STORAGES = ("float", "int8")
RATE = 6e-5  # what did best at a divergence of one nat a token; 2e-5 to 3e-5 did at a third, 1e-5 at a tenth
TEXT_SHARE = 0.3  # of the text's own next token in `mixed`, at most
ARITHMETIC = ("auto", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class RefineSettings:
    """One refinement of the folder `model`, made from `dense`; everything but `out` decides the result."""

    model: pathlib.Path
    dense: pathlib.Path
    text: pathlib.Path  # .txt or .jsonl, as for `compress`; its end judges and is never trained on
    out: pathlib.Path
    stages: tuple[str, ...] = ("distill",)  # in order: blocks (layer by layer) | distill (the whole model)
    # of distill: KL(dense || compressed) with a share of the text's next token | without | that token alone
    # (the paper's)
    loss: str = "mixed"
    # 0 moves the factors themselves; r trains a LoRA of rank r on each factor and merges it (less memory)
    adapter_rank: int = 0
    learning_rate: float | None = None  # of Adam, at its highest; None: `rate_for`
    tokens: int = 655360  # trained on in all; where the text has fewer it is gone through again
    window: int = 256  # tokens per training window: attention is dear on a CPU
    batch: int = 4  # windows per step: small steps, since few tokens are seen
    judge_tokens: int = 8192  # from the end of the text, in windows of 1024
    # Of the matrix products (refinement/descent.py); the factors and their sums stay fp32.
    arithmetic: str = "auto"
    storage: str = "float"  # of the result: as the source | int8, which every step of distill sees
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values, allowed in (
            ("stages", self.stages, STAGES),
            ("loss", (self.loss,), LOSSES),
            ("arithmetic", (self.arithmetic,), ARITHMETIC),
            ("storage", (self.storage,), STORAGES),
        ):
            wrong = [value for value in values if value not in allowed]
            if wrong or not values or len(set(values)) < len(values):
                raise UsageError(
                    f"--{name}: expected distinct values of {', '.join(allowed)}, found "
                    f"{', '.join(values) or 'none'}."
                )
        for name in ("tokens", "window", "batch", "judge_tokens", "learning_rate"):
            if (found := getattr(self, name)) is not None and not 0 < found < math.inf:
                raise UsageError(f"--{name.replace('_', '-')}: expected a positive number, found {found}.")
        check_seed(self.seed)
        if self.adapter_rank < 0:
            raise UsageError(f"--adapter-rank: expected 0 or a positive number, found {self.adapter_rank}.")

    @property
    def is_int8(self) -> bool:
        return self.storage == "int8"

    def text_share_for(self, divergence: float) -> float:
        """Which share of the loss the text's next token has, for a model `divergence` nats a token away.

        A damaged model learns from the text what the dense model's opinion of it does not tell; one that is
        near the dense model would only be pulled away from it.
        """
        return {"mixed": min(TEXT_SHARE, divergence), "kl": 0.0, "next-token": 1.0}[self.loss]

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
            f"LoRA of rank {self.adapter_rank} on every weight"
            if self.adapter_rank
            else "the weights themselves"
        )
        words = {
            "blocks": "layer by layer against the dense layer",
            "distill": f"end to end, loss {self.loss}",
        }
        stored = ", through int8" if self.is_int8 else ""
        return f"{'; then '.join(words[stage] for stage in self.stages)}; {moves}{stored}"

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "out"}
        values["stages"] = list(self.stages)
        return {
            key: str(value) if isinstance(value, pathlib.Path) else value for key, value in values.items()
        }
