"""Compress one model with several methods at equal bytes, and judge them on text that none of them saw.

    python examples/compare_methods.py build/smollm2/dense --calibrate build/smollm2/calibration.jsonl \\
        --judge build/smollm2/heldout.jsonl --out build/compare --remove 0.20
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

METHODS = {
    "plain SVD, uniform": ["--method", "plain", "--allocation", "uniform", "--form", "uv"],
    "whitened, uniform (SVD-LLM)": ["--method", "whitened", "--allocation", "uniform", "--form", "uv"],
    "two-sided, global, uv": ["--form", "uv"],
    "two-sided, global, compact": ["--form", "compact"],
}


def neuronmlp(*arguments: object) -> str:
    command = [sys.executable, "-m", "neuronmlp_plugin.cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--calibrate", type=pathlib.Path, required=True)
    parser.add_argument("--judge", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--remove", type=float, default=0.20)
    parser.add_argument("--judge-tokens", type=int, default=16384)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more options for `neuronmlp compress`, last")
    args = parser.parse_args()
    print(f"{'method':<30}{'removed':>9}{'ppl/dense':>11}{'KL':>9}{'top-1':>8}")
    for name, options in METHODS.items():
        target = args.out / name.replace(" ", "-").replace(",", "")
        if not target.exists():
            neuronmlp(
                "compress",
                args.model,
                "--out",
                target,
                "--remove",
                args.remove,
                "--text",
                args.calibrate,
                "--quiet",
                *options,
                *args.options,
            )
        removed = json.loads(neuronmlp("inspect", target, "--json"))["removed_ratio"]
        window = args.options[args.options.index("--window") + 1] if "--window" in args.options else 1024
        judged = neuronmlp(
            "evaluate", target, "--dense", args.model, "--text", args.judge, "--tokens", args.judge_tokens, "--window", window, "--json"
        )
        q = json.loads(judged)
        print(f"{name:<30}{removed:>9.2%}{q['perplexity_ratio']:>11.3f}{q['kl_divergence']:>9.4f}{q['top1_agreement']:>8.1%}", flush=True)


if __name__ == "__main__":
    main()
