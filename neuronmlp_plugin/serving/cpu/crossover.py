"""From how many tokens on vLLM's own products beat ours on this machine: measured when a model is loaded.

Few tokens are bound by reading weights, many by arithmetic, and who is quicker depends on the processor, the
compiler and the libraries that vLLM brought. One matrix in a few copies (so that it is not read from the
nearest cache) is multiplied both ways in turns, which takes some 100 ms a dtype.
"""

from __future__ import annotations

import functools
import itertools
import time

import torch

from neuronmlp_plugin.models.definition import Linear, Weight
from neuronmlp_plugin.serving.cpu.chain import INPUT, OUTPUT, Chain, Place
from neuronmlp_plugin.serving.cpu.gemm import prepacked_linear

TOKENS = (1, 8, 128, 1024)
SIZE, COPIES, ROUNDS = 768, 4, 7
# A chain saves calls and memory, which this does not measure; and a busy machine errs by as much.
MARGIN = 1.25


@functools.cache
def limit_of(dtype: torch.dtype) -> float:
    """The fewest tokens that vLLM's products multiply faster by MARGIN; infinity where there is no such
    number among TOKENS, 1 where a chain should not be used at all.
    """
    weights = [torch.randn(SIZE, SIZE, dtype=dtype) for _ in range(COPIES)]
    ours, theirs = [_alone(weight) for weight in weights], [prepacked_linear(weight) for weight in weights]
    for tokens in TOKENS:
        x = torch.randn(tokens, SIZE, dtype=dtype)
        if _ratio(ours, theirs, x) > MARGIN:
            return tokens
    return float("inf")


def _alone(weight: torch.Tensor) -> Linear:
    chain = Chain(weight.shape[1], weight.shape[0], weight.dtype)
    chain.add(0, Weight(weight), Place(INPUT), Place(OUTPUT))
    return chain.finish()


def _ratio(ours: list[Linear], theirs: list[Linear], x: torch.Tensor) -> float:
    """The best time of ours over the best of theirs: whatever else runs can only make either slower."""
    best = {id(way): float("inf") for way in (ours, theirs)}
    for _, way in itertools.product(range(ROUNDS), (ours, theirs)):
        best[id(way)] = min(best[id(way)], _timed(way, x))
    return best[id(ours)] / best[id(theirs)]


def _timed(products: list[Linear], x: torch.Tensor) -> float:
    start = time.perf_counter()
    for product in products:
        product(x)
    return time.perf_counter() - start
