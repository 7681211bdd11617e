"""`neuronmlp bench layers`: time to first token and per output token of whole models, with Amdahl's bound. Simulated throughout."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from neuronmlp_plugin.bench.arguments import add_csv, add_model_arguments, one_of
from neuronmlp_plugin.bench.rows import Row, append_rows
from nki_kernels.cost.constants import SETS
from nki_kernels.cost.models import MODELS, rank_at
from nki_kernels.targets import TARGETS

if TYPE_CHECKING:
    from nki_kernels.cost.transformer import Parts

HEAD = (
    f"{'model':<14}{'tp':>4} {'step':<22}{'dense us':>12}{'low-rank us':>12}{'speed-up':>9}{'MLP':>7}{'Amdahl':>8}  low-rank, share of time"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="*", default=[*MODELS], type=one_of(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)"
    )
    parser.add_argument(
        "--remove", type=float, default=0.20, metavar="SHARE", help="share of the MLP parameters taken away (default %(default)s)"
    )
    parser.add_argument("--form", choices=("uv", "compact"), default="uv")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 8, 32], help="cores (default 1 8 32)")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prefill, and of context in decode (default %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="sequences decoded together (default 1 16)")
    add_model_arguments(parser)
    add_csv(parser)


def _shares(parts: Parts) -> str:
    named = {"MLP": parts.mlp, "its collectives": parts.mlp_collectives, "attention": parts.attention + parts.attention_collectives}
    return ", ".join(f"{name} {us / parts.total:.0%}" for name, us in named.items())


def run(args: argparse.Namespace) -> int:
    from nki_kernels.cost.transformer import Step, amdahl, step_time

    target, constants = TARGETS[args.target], SETS[args.constants]
    print(f"simulated, {target.name}, bf16, constants {constants.name}, MLPs {args.form} at removed_ratio {args.remove}\n{HEAD}")
    steps = {"TTFT": Step(1, args.prompt, args.prompt)} | {f"TPOT batch {size}": Step(size, 1, args.prompt) for size in args.batch}
    rows = []
    for shape in (MODELS[name] for name in args.models):
        low = ((args.form, rank_at(shape, args.remove)),) * 3
        for tp in args.tp:
            for label, step in steps.items():
                dense = step_time(shape, (("dense", 0),) * 3, step, tp, target, constants)
                parts = step_time(shape, low, step, tp, target, constants)
                speedup, bound = dense.total / parts.total, amdahl(dense.mlp_share)
                numbers = f"{dense.total:>12.0f}{parts.total:>12.0f}{speedup:>9.3f}{dense.mlp_share:>7.0%}{bound:>8.2f}"
                print(f"{shape.name:<14}{tp:>4} {label:<22}{numbers}  {_shares(parts)}", flush=True)
                case = f"layers {shape.name} tp={tp} {label}"
                where = f"{target.name}, constants {constants.name}"
                for name, value in (("dense", dense.total), (args.form, parts.total)):
                    rows.append(Row(f"{case} {name}", "simulated_us", "us", value, "simulated", where))
    if args.csv:
        append_rows(args.csv, rows)
    return 0
