"""The first thing to run on a new Trainium machine: is every sequence of a batch what the checkpoint says,
and did the kernels run?

    python examples/trn1/smoke_test.py compressed-model --tensor-parallel-size 2

Generates greedily for a batch of prompts, then scores each new token by the plain torch forward of the same
checkpoint on the host's CPU (in fp32). bf16 rounds, so a token passes if its reference logit is within
--margin of the best one; garbage is off by far more. Prints one line a sequence, which path the MLPs took,
and one verdict; exit code 1 if the verdict is FAIL.

NEURON_COMPILED_ARTIFACTS is ignored: the smoke test compiles for its own sizes, so that it judges this
folder, these kernels and these versions, and nothing that an earlier run left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colours are",
    "In the year 1969, two astronauts",
    "A haiku about the sea:",
    "The opposite of cold is",
    "To bake bread you need flour,",
    "Once upon a time, in a small village",
)


def generate(args: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """(prompt, new tokens) of every sequence, from one batch through vLLM."""
    if os.environ.pop("NEURON_COMPILED_ARTIFACTS", None):
        print("NEURON_COMPILED_ARTIFACTS is ignored here: the smoke test compiles for its own sizes")
    from vllm import LLM, SamplingParams

    blocks = {} if on_cpu() else {"num_gpu_blocks_override": len(PROMPTS)}
    llm = LLM(
        args.model,
        tokenizer=args.tokenizer,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=args.max_model_len,
        max_num_seqs=len(PROMPTS),
        enable_prefix_caching=False,
        dtype=args.dtype,
        enforce_eager=args.enforce_eager,
        additional_config=json.loads(args.additional_config),
        **blocks,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)
    return [
        (list(out.prompt_token_ids), list(out.outputs[0].token_ids))
        for out in llm.generate(list(PROMPTS), sampling)
    ]


def on_cpu() -> bool:
    """Whether vLLM serves on the CPU itself, where blocks of the KV cache are small and many. On Neuron,
    without prefix caching, a block is a whole sequence, and the vendor wants as many as sequences.
    """
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def worst_gap(model: Any, prompt: list[int], new: list[int]) -> float:
    """The largest distance, in logits, of a generated token from the reference's own choice at its place."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + new[:-1]])).logits[0, len(prompt) - 1 :]
    return float((logits.amax(-1) - logits[torch.arange(len(new)), torch.tensor(new)]).max())


def dispatch() -> dict[str, list[list[Any]]]:
    """What the plugin recorded in this machine's model process: layers and runs by [phase, path, reason]."""
    from neuronmlp_plugin.serving.trainium.metrics import records

    return {key: [row for record in records() for row in record[key]] for key in ("layers", "runs")}


def paths(layers: list[list[Any]]) -> list[str]:
    """A line for each way that MLP layers took, of `DispatchRecord.totals`."""
    return [
        f"{phase}: {count} MLP layers by {path}, {weights} weights ({reason})"
        for phase, path, reason, weights, count in layers
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="local folder written by `neuronmlp compress`")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--factors", help="a factor file, if MODEL is a dense folder")
    parser.add_argument("--tokenizer", help="a folder of its own, where MODEL's is of another transformers")
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="as for `vllm serve`: on a CPU, no compiling before the first token",
    )
    parser.add_argument("--margin", type=float, default=1.0, help="logits")
    parser.add_argument("--additional-config", default="{}", help="as for `vllm serve`")
    args = parser.parse_args()
    if args.factors:
        config = json.loads(args.additional_config)
        ours = config.setdefault("override_neuron_config", {}).setdefault("neuronmlp", {})
        ours.setdefault("factors", args.factors)
        args.additional_config = json.dumps(config)

    batch = generate(args)
    from neuronmlp_plugin.checkpoint.loader import load_model

    model = load_model(args.model, factors=args.factors)
    gaps = [worst_gap(model, prompt, new) for prompt, new in batch]
    for text, gap in zip(PROMPTS, gaps, strict=True):
        print(f"{'ok   ' if gap <= args.margin else 'WRONG'}  worst gap {gap:8.3f} logits  {text!r}")
    for line in paths(dispatch()["layers"]):
        print(line)
    wrong = sum(not gap <= args.margin for gap in gaps)  # NaN agrees with nothing
    print(
        f"verdict: {'FAIL' if wrong else 'PASS'}, {len(gaps) - wrong} of {len(gaps)} sequences agree with "
        "the CPU reference"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
