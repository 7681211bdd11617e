"""Offline batch generation with vLLM: a compressed folder is used like any other model.

python examples/offline_batch.py build/demo/compact-0.10
"""

from __future__ import annotations

import argparse
import os

PROMPTS = [
    "Name three rivers of Europe.",
    "Write one sentence about the sea.",
    "What does a thermometer measure?",
    "Give a word that rhymes with light.",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", help="folder written by `neuronmlp compress`, or a dense one to compare with"
    )
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault(
        "VLLM_CPU_KVCACHE_SPACE", "1"
    )  # GiB; vLLM's own default takes most of the machine's memory
    from vllm import LLM, SamplingParams

    llm = LLM(args.model, dtype="float32", enforce_eager=True, max_model_len=512)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    for prompt, output in zip(
        PROMPTS, llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=args.max_tokens)), strict=True
    ):
        print(f"{prompt}\n  -> {output.outputs[0].text.strip()}\n")


if __name__ == "__main__":
    main()
