"""Decode throughput of several checkpoints in real vLLM, interleaved in one run so that the machine's noise
hits all alike.

Each model has an engine in a process of its own. A round times every model once, in an order that rotates;
what is reported is the median over rounds, and ratios are taken within a round.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence

from neuronmlp_plugin.bench.engines import EngineSettings, Job, engines
from neuronmlp_plugin.checkpoint.reader import Checkpoint

PROMPT_TOKENS, WARM_TOKENS = 32, 8


@dataclasses.dataclass(frozen=True)
class Decode:
    """`tokens_per_second` and `speedup` over the first model are medians over rounds.

    `ideal`: the speed-up if decoding cost nothing but reading weights, i.e. the ratio of the bytes that a
    step reads.
    """

    model: str
    batch: int
    tokens_per_second: float
    speedup: float
    ideal: float

    @property
    def share_of_ideal(self) -> float:
        """How much of the possible gain was achieved; NaN where there is none to have."""
        return (self.speedup - 1.0) / (self.ideal - 1.0) if self.ideal > 1.0 else float("nan")


def bytes_per_step(folder: pathlib.Path, dtype: str) -> int:
    """Bytes of weights that one decode step reads: all but an embedding table of which it only looks up rows.

    Floating point counts in the engine's `dtype` (vLLM makes every "auto" 16 bits wide), int8 as it is, with
    fp32 scales.
    """
    checkpoint = Checkpoint(folder)
    tied, width = (
        bool(checkpoint.config.get("tie_word_embeddings")),
        4 if dtype in ("float32", "float") else 2,
    )
    read = {
        name: kind
        for name, kind in checkpoint.dtypes().items()
        if tied or name != "model.embed_tokens.weight"
    }
    shapes = checkpoint.shapes()
    scales = checkpoint.block.expected_scales() if checkpoint.block is not None else {}
    weights = sum(math.prod(shapes[name]) * (1 if kind == "I8" else width) for name, kind in read.items())
    return weights + 4 * sum(rows for (rows,) in scales.values())


def measure_decode(
    folders: dict[str, pathlib.Path],
    batches: Sequence[int],
    *,
    new_tokens: int,
    rounds: int,
    dtype: str,
    tick: Callable[[int], None],
) -> list[Decode]:
    """Time every model at every batch size; the first one is what the others are compared with."""
    sizes = {name: bytes_per_step(folder, dtype) for name, folder in folders.items()}
    names = list(folders)
    times: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in names for batch in batches}
    settings = EngineSettings(dtype, max(batches), PROMPT_TOKENS + max(WARM_TOKENS, new_tokens))
    with engines(folders, settings) as ask:

        def seconds(name: str, batch: int, tokens: int) -> float:
            """All but the first token."""
            whole = ask[name](Job(batch, PROMPT_TOKENS, tokens)).seconds
            return whole - ask[name](Job(batch, PROMPT_TOKENS, 1)).seconds

        for name in names:
            for batch in batches:  # warm up: packing, caches, first-shape costs
                seconds(name, batch, WARM_TOKENS)
        for turn in range(rounds):
            for batch in batches:
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    times[name, batch].append(seconds(name, batch, new_tokens))
                    tick(1)
    results = []
    for batch in batches:
        for name in names:
            mine, first = times[name, batch], times[names[0], batch]
            speedup = statistics.median(a / b for a, b in zip(first, mine, strict=True))
            rate = batch * (new_tokens - 1) / statistics.median(mine)
            results.append(Decode(name, batch, rate, speedup, sizes[names[0]] / sizes[name]))
    return results
