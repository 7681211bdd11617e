"""Run a checkpoint in a real vLLM engine, in a process of its own, and bring back its logits."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import torch

from tests.loopback import HOOK

ROOT = pathlib.Path(__file__).parent.parent.parent
PROMPTS = [[5, 17, 99, 4, 63, 12, 7, 3, 88], [101, 3, 42], [9] * 20]
NEW_TOKENS = 4
# One engine a process: vLLM keeps its process groups until the end. Importing vLLM takes longer than a tiny
# engine does, so a process that has imported it waits for requests and forks one engine for each, and an
# engine forks its ranks (vLLM spawns them: `spawn`): it reads lines of JSON and answers each with "ENDED" and
# the exit code (older vLLM logs to stdout as well).
# What every engine imports is imported here, and no engine's collector looks at it again. Where nothing else is
# compiled the sampler is not: its ranks of logprobs take seconds to compile, and nobody asks for them.
_PROGRAM = """
import gc, json, multiprocessing, os, signal, sys, torch
import vllm.model_executor.models.llama, vllm.model_executor.models.qwen2, vllm.model_executor.models.qwen3
import vllm.v1.engine.core, vllm.v1.worker.cpu_worker
from vllm import LLM, SamplingParams
from vllm.v1.executor import multiproc_executor

def answer(options, prompts, new_tokens, vocabulary, spawn):
    if not spawn:
        multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    torch._dynamo.config.disable = options["enforce_eager"]
    llm = LLM(skip_tokenizer_init=True, **{"dtype": "float32", **options}, max_model_len=64, max_num_seqs=4, max_logprobs=vocabulary,
              logprobs_mode="raw_logits", enable_prefix_caching=False)
    params = SamplingParams(max_tokens=new_tokens, temperature=0, logprobs=vocabulary, prompt_logprobs=vocabulary, detokenize=False,
                            ignore_eos=True)
    results = []
    for output in llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False):
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        logits = [[step[token].logprob for token in range(vocabulary)] for step in steps]
        results.append({"tokens": list(output.outputs[0].token_ids), "logits": logits})
    print("RESULT" + json.dumps(results))

if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(600)  # one that hangs is ended
            os.environ.clear()
            os.environ.update(request["environment"])
            for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
            answer(*request["arguments"])
            break  # and end as any program does
        print("ENDED", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _waiting() -> subprocess.Popen[str]:
    """The process that forks engines; it ends when its stdin does, with this one."""
    return subprocess.Popen(
        [sys.executable, "-c", HOOK + _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def environment(tensor_parallel: int = 1) -> dict[str, str]:
    """What vLLM on a small CPU needs (shared facts: vllm_cpu.md)."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    if tensor_parallel > 1:
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {**os.environ, **settings, "PYTHONPATH": str(ROOT)}


def run_engine(
    folder: pathlib.Path, *, vocabulary: int = 128, spawn: bool = False, **options
) -> subprocess.CompletedProcess[str]:
    """The finished process; its stdout ends in a RESULT line if all went well."""
    options = {"model": str(folder), "enforce_eager": True, **options}
    with tempfile.TemporaryDirectory() as home:
        outputs = {name: str(pathlib.Path(home, name)) for name in ("stdout", "stderr")}
        arguments = [options, PROMPTS, NEW_TOKENS, vocabulary, spawn]
        request = {"environment": environment(options.get("tensor_parallel_size", 1)), "arguments": arguments}
        waiting = _waiting()
        assert waiting.stdin is not None and waiting.stdout is not None
        print(json.dumps({**request, **outputs}), file=waiting.stdin, flush=True)
        ended = next(line for line in waiting.stdout if line.startswith("ENDED"))
        said = {name: pathlib.Path(path).read_text(errors="replace") for name, path in outputs.items()}
    return subprocess.CompletedProcess(arguments, int(ended.split()[1]), **said)


def served_logits(folder: pathlib.Path, **options) -> list[tuple[list[int], torch.Tensor]]:
    """For each prompt: all its tokens with the new ones, and the raw logits `[tokens - 1, vocabulary]` that
    vLLM computed.
    """
    return logits_of(run_engine(folder, **options))


def logits_of(process: subprocess.CompletedProcess[str]) -> list[tuple[list[int], torch.Tensor]]:
    """What a finished process computed; fails with its last words."""
    assert process.returncode == 0, process.stderr[-3000:]
    line = next(line for line in process.stdout.splitlines() if line.startswith("RESULT"))
    results = json.loads(line.removeprefix("RESULT"))
    return [
        (prompt + r["tokens"], torch.tensor(r["logits"])) for prompt, r in zip(PROMPTS, results, strict=True)
    ]
