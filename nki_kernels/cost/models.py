"""Shapes of the models that the tables are for, and the ranks that a budget leaves them."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What decides the cost of a decoder."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    least_tp: int = 1  # tables begin with this many cores

    def why_not_on(self, tp: int) -> str | None:
        """Why the model cannot be shared out over `tp` cores, in a sentence, or None."""
        for what, size in (("channels", self.intermediate), ("heads", self.heads)):
            if size % tp:
                return f"expected a divisor of the {size} {what} of {self.name}, found {tp}; choose another."
        return None


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128_256),
        ModelShape("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128, 128_256),
        ModelShape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128_256),
        ModelShape("Mistral-7B", 4096, 14336, 32, 32, 8, 128, 32_768),
        ModelShape("Qwen3-1.7B", 2048, 6144, 28, 16, 8, 128, 151_936),
        ModelShape("Qwen3-4B", 2560, 9728, 36, 32, 8, 128, 151_936),
        ModelShape("Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151_936),
        ModelShape("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128, 128_256, least_tp=8),
    )
}


def rank_at(hidden: int, channels: int, form: str, removed_ratio: float) -> int:
    """The largest rank at which the factors of a projection `[hidden, channels]` hold at most
    (1 - removed_ratio) of its parameters: R (H + I) of them for `uv`, R (H + I - R) for `compact`.
    Llama-3.2-1B at 0.20: 1310 and 1543. 0 where not even rank 1 fits.
    """
    budget, total = (1 - removed_ratio) * hidden * channels, hidden + channels
    if form == "uv":
        return int(budget / total)
    return int((total - math.sqrt(total * total - 4 * budget)) / 2)
