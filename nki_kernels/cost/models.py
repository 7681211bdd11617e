"""Shapes of the models that the tables and the tuned plans are for."""

from __future__ import annotations

import dataclasses


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
    )
}


def rank_at(shape: ModelShape, removed_ratio: float) -> int:
    """The largest rank at which the factors of a projection hold at most (1 - removed_ratio) of its
    parameters.
    """
    return int((1 - removed_ratio) * shape.hidden * shape.intermediate / (shape.hidden + shape.intermediate))
