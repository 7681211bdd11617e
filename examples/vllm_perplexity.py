"""Perplexity of model folders as vLLM serves them, over the first folder's: one measure for every format that
vLLM loads (dense, ours, W8A8, GPTQ, ...), where `neuronmlp evaluate` judges its own folders without vLLM.

    python examples/vllm_perplexity.py build/smollm2/dense build/c20-int8 build/w8a8 --text build/smollm2/heldout.jsonl
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import multiprocessing
import os
import pathlib

from neuronmlp_plugin.calibration.text import held_out_windows


def perplexity(folder: pathlib.Path, windows: list[list[int]], dtype: str) -> float:
    """exp of the mean negative log probability of every token but the first of its window."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    from vllm import LLM, SamplingParams

    longest = max(map(len, windows))
    # Tokens that the prefix cache knows are not computed, and have no probabilities.
    llm = LLM(
        str(folder), dtype=dtype, enforce_eager=True, max_model_len=longest + 1, enable_prefix_caching=False
    )
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    loss, count = 0.0, 0
    for output in llm.generate([{"prompt_token_ids": window} for window in windows], asked):
        for token, found in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            loss -= found[token].logprob
            count += 1
    return math.exp(loss / count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="+", type=pathlib.Path, help="the first is what the others are compared with"
    )
    parser.add_argument("--text", type=pathlib.Path, required=True, help="text that none of them has seen")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="of it, evenly spread (default %(default)s)"
    )
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="that vLLM serves in (default %(default)s)")
    args = parser.parse_args()
    windows = held_out_windows(args.folders[0], args.text, args.tokens, args.window).tolist()
    reference = None
    for folder in args.folders:
        # An engine leaves its memory and its threads to the process: each folder has one of its own.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
            found = process.submit(perplexity, folder, windows, args.dtype).result()
        reference = reference or found
        print(
            f"{folder}  perplexity {found:.4f}  over {args.folders[0].name} {found / reference:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
