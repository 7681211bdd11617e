"""Decode throughput of several checkpoints in real vLLM, interleaved in one run so that the machine's noise
hits all alike.

Each model has an engine in a process of its own. A round times every model once, in an order that rotates;
what is reported is the median over rounds, and ratios are taken within a round.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from neuronmlp_plugin.checkpoint.files import read_config
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import UsageError

PROMPT_TOKENS, WARM_TOKENS = 32, 8
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


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
    with _engines(folders, dtype, max(batches), PROMPT_TOKENS + max(WARM_TOKENS, new_tokens)) as engines:
        for name in names:
            for batch in batches:  # warm up: packing, caches, first-shape costs
                engines[name]((batch, WARM_TOKENS))
        for turn in range(rounds):
            for batch in batches:
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    times[name, batch].append(engines[name]((batch, new_tokens)))
                    tick(1)
    results = []
    for batch in batches:
        for name in names:
            mine, first = times[name, batch], times[names[0], batch]
            speedup = statistics.median(a / b for a, b in zip(first, mine, strict=True))
            rate = batch * (new_tokens - 1) / statistics.median(mine)
            results.append(Decode(name, batch, rate, speedup, sizes[names[0]] / sizes[name]))
    return results


@contextmanager
def _engines(
    folders: dict[str, pathlib.Path], dtype: str, batch: int, length: int
) -> Iterator[dict[str, Callable[[Any], float]]]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, folder in folders.items():
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, str(folder), dtype, batch, length), daemon=True
        )
        process.start()
        theirs.close()
        pipes[name] = ours
        processes.append(process)
    try:
        for name in folders:
            _answer(name, pipes[name])  # ready
        yield {name: lambda job, name=name: _ask(name, pipes[name], job) for name in folders}  # type: ignore[misc]
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join(timeout=30)
            process.kill()


def _ask(name: str, pipe: Connection, job: tuple[int, int]) -> float:
    pipe.send(job)
    return float(_answer(name, pipe))


def _answer(name: str, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError as error:
        raise UsageError(
            f"{name}: expected an engine that answers, found that it stopped; its own message stands above."
        ) from error


def _serve(pipe: Connection, folder: str, dtype: Any, batch: int, length: int) -> None:
    """Engine process: answers (batch, new tokens) with the seconds that all but the first token took."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=length,
        max_num_seqs=max(8, batch),
        disable_log_stats=True,
    )
    vocabulary = int(read_config(pathlib.Path(folder))["vocab_size"])
    pipe.send("ready")
    while True:
        try:
            batch, new_tokens = pipe.recv()
        except EOFError:
            return
        pipe.send(_timed(llm, vocabulary, batch, new_tokens) - _timed(llm, vocabulary, batch, 1))


def _timed(llm: Any, vocabulary: int, batch: int, new_tokens: int) -> float:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    # Different first tokens, so that no prefix is shared or cached between sequences and calls.
    start = time.perf_counter_ns()
    prompts = [
        {"prompt_token_ids": [(start + 7 * i + j) % vocabulary for j in range(PROMPT_TOKENS)]}
        for i in range(batch)
    ]
    begin = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - begin
