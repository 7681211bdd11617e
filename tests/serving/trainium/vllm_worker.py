"""Offline generation by a real vLLM on a real vllm-neuron: `python -m tests.serving.trainium.vllm_worker
ARGUMENTS.json RESULTS.json`.
"""

from __future__ import annotations

import json
import sys


def main(arguments_path: str, results_path: str) -> None:
    from vllm import LLM, SamplingParams

    with open(arguments_path, encoding="utf-8") as handle:
        arguments = json.load(handle)
    model = LLM(**arguments["llm"])
    sampling = SamplingParams(
        temperature=0.0, max_tokens=arguments["new_tokens"], ignore_eos=True, detokenize=False
    )
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in arguments["prompts"]], sampling)
    with open(results_path, "w", encoding="utf-8") as handle:
        json.dump([output.outputs[0].token_ids for output in outputs], handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
