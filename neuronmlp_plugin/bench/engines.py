"""Engines in processes of their own that answer how long a job took: vLLM for folders, llama.cpp for .gguf
files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from neuronmlp_plugin.bench.parts import timed_parts
from neuronmlp_plugin.errors import UsageError

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# Both sides held to AVX2: torch, oneDNN and our own products; `_hide_avx512` holds vLLM's own kernels.
_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "NEURONMLP_MARCH": "x86-64-v3",
}


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """`batch`, `length`: the most sequences at once, and the most tokens of one with its prompt.

    `processor_time`: one thread, and the time that it had a core, which another's load on the machine changes
    little; else all cores and the time that passes.
    """

    dtype: str
    batch: int
    length: int
    compiled: bool = False
    avx2: bool = False
    processor_time: bool = False

    @property
    def environment(self) -> dict[str, str]:
        one = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} if self.processor_time else {}
        return {**_ENVIRONMENT, **(_AVX2 if self.avx2 else {}), **one}

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.processor_time else time.perf_counter


@dataclasses.dataclass(frozen=True)
class Job:
    """`batch` sequences of `prompt` tokens, each continued by `new` tokens; `parts`: told by parts, too."""

    batch: int
    prompt: int
    new: int
    parts: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """Time of a job, and the engine process's peak of resident memory so far; seconds by part (`parts.py`)
    where they were asked for.
    """

    seconds: float
    peak_bytes: int
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)


Engine = Callable[[Job], Answer]


@contextmanager
def engines(models: Mapping[str, pathlib.Path], settings: EngineSettings) -> Iterator[dict[str, Engine]]:
    """An engine for each model, all loaded; raises UsageError where one stops."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for name, path in models.items():  # one after the other: two that load at once want twice the memory
            ours, theirs = context.Pipe()
            serve = _serve_llama if path.suffix == ".gguf" else _serve_vllm
            process = context.Process(target=serve, args=(theirs, str(path), settings), daemon=True)
            process.start()
            # The engine has a copy of its own: only when that is gone does reading here end with EOF.
            theirs.close()
            pipes[name] = ours
            processes.append(process)
            _answer(name, ours)  # ready
        yield {name: functools.partial(_ask, name, pipe) for name, pipe in pipes.items()}
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join(timeout=30)
            process.kill()


def _ask(name: str, pipe: Connection, job: Job) -> Answer:
    pipe.send(job)
    answer: Answer = _answer(name, pipe)
    return answer


def _answer(name: str, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError as error:
        raise UsageError(
            f"{name}: expected an engine that answers, found that it stopped; its own message stands above."
        ) from error


def _serve_vllm(pipe: Connection, folder: str, settings: EngineSettings) -> None:
    os.environ.update(settings.environment)
    if settings.avx2:
        _hide_avx512()
    from vllm import LLM

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype=settings.dtype,  # type: ignore[arg-type]
        enforce_eager=not settings.compiled,
        max_model_len=settings.length,
        max_num_seqs=max(8, settings.batch),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    config = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
    vocabulary = int(config["vocab_size"])

    def run(job: Job) -> tuple[float, Mapping[str, float]]:
        if not job.parts:
            return _run_vllm(llm, vocabulary, job, settings.clock), {}
        (model,) = llm.apply_model(lambda model: model)
        with timed_parts(model, settings.clock) as parts:
            seconds = _run_vllm(llm, vocabulary, job, settings.clock)
        return seconds, parts

    _answer_jobs(pipe, run)


def _hide_avx512() -> None:
    """vLLM picks its kernels by what torch says about the processor."""
    import torch

    for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        setattr(torch.cpu, name, lambda: False)


def _answer_jobs(pipe: Connection, run: Callable[[Job], tuple[float, Mapping[str, float]]]) -> None:
    pipe.send("ready")
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        seconds, parts = run(job)
        pipe.send(Answer(seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, parts))


def _prompts(job: Job, vocabulary: int) -> list[list[int]]:
    """Different first tokens, so that no prefix is shared or cached between sequences and calls."""
    start = time.perf_counter_ns()
    return [[(start + 7 * i + j) % vocabulary for j in range(job.prompt)] for i in range(job.batch)]


def _run_vllm(llm: Any, vocabulary: int, job: Job, clock: Callable[[], float]) -> float:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=job.new, temperature=0.0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in _prompts(job, vocabulary)]
    begin = clock()
    llm.generate(prompts, params, use_tqdm=False)
    return clock() - begin


def _serve_llama(pipe: Connection, path: str, settings: EngineSettings) -> None:
    """llama.cpp as `llama-cpp-python` brings it, one sequence at a time, which is how its binding decodes."""
    from llama_cpp import Llama

    threads = 1 if settings.processor_time else len(os.sched_getaffinity(0))
    llm = Llama(path, n_ctx=settings.length, n_threads=threads, n_threads_batch=threads, verbose=False)
    _answer_jobs(pipe, lambda job: (_run_llama(llm, job, settings.clock), {}))


def _run_llama(llm: Any, job: Job, clock: Callable[[], float]) -> float:
    begin = clock()
    for prompt in _prompts(job, llm.n_vocab()):
        llm.reset()
        llm.eval(prompt)
        for _ in range(job.new - 1):
            llm.eval([llm.sample(temp=0.0)])
    return clock() - begin


def named_folders(kind: str, models: Sequence[str]) -> dict[str, pathlib.Path]:
    """Name -> folder, in the order given; raises UsageError for a model without a name, or two of one."""
    pairs = [model.partition("=") for model in models]
    if any(not sep for _, sep, _ in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise UsageError(
            f"bench {kind}: expected models as NAME=FOLDER with different names, found {' '.join(models)}."
        )
    return {name: pathlib.Path(folder) for name, _, folder in pairs}
