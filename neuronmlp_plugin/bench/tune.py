"""`neuronmlp bench tune`: searches tile plans with the cost model (simulated) and writes the table that the planner looks into first."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from neuronmlp_plugin.bench.arguments import add_model_arguments, one_of
from nki_kernels.cost.constants import SETS
from nki_kernels.cost.models import MODELS, rank_at
from nki_kernels.targets import TARGETS

if TYPE_CHECKING:
    from nki_kernels.planner import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="*", default=[*MODELS], type=one_of(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="table to write; one that exists is added to")
    parser.add_argument("--remove", type=float, nargs="+", default=[0.20], metavar="SHARE", help="of the MLP parameters (default 0.20)")
    parser.add_argument("--form", choices=("dense", "uv", "compact"), nargs="+", default=["dense", "uv"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512, 2048, 8192], help="per launch (default: 1 ... 8192)")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 8], help="cores (default 1 8)")
    add_model_arguments(parser)


def _requests(args: argparse.Namespace, model: str) -> Iterator[tuple[int, Request]]:
    """(tp, launch) for every form, removed ratio, token count and core count."""
    from nki_kernels.cost.baselines import BF16
    from nki_kernels.cost.tensor_parallel import shard, stage_request, stages

    shape = MODELS[model]
    ranks = [rank_at(shape, share) for share in args.remove]
    forms = [(form, rank) for form in args.form for rank in ([0] if form == "dense" else ranks)]
    for form, rank in forms:
        for tp in args.tp:
            projection = shard(form, rank, shape.intermediate, tp)
            for layout in stages(shape.hidden, shape.intermediate, (projection,) * 3, tp):
                for tokens in args.tokens:
                    yield tp, stage_request(layout, tokens, BF16)


def _choose(request: Request, tp: int, args: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    """A line for the user, and the fields of the choice if there is one."""
    from nki_kernels.cost.search import Found, search

    began = time.perf_counter()
    found = search(request, TARGETS[args.target], SETS[args.constants], tp)
    took = f"[{time.perf_counter() - began:.1f} s]"
    if not isinstance(found, Found):
        return f"{took} no plan: {found.reason}", None
    line = f"{took} simulated_us {found.estimate.simulated_us:.1f}, {found.tried} of {found.fitting} plans scheduled"
    return line, dataclasses.asdict(found.choice)


def run(args: argparse.Namespace) -> int:
    from nki_kernels.tuned import key

    stored: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    choices: dict[str, Any] = stored.get("choices", {})
    for model in args.models:
        for tp, request in _requests(args, model):
            name = key(request)
            if name in choices:
                continue
            line, fields = _choose(request, tp, args)
            print(f"{model} tp={tp} {name}\n    {line}", flush=True)
            if fields is not None:
                choices[name] = fields
        about = f"simulated on {args.target} with constants {args.constants}; neuronmlp bench tune"
        args.out.write_text(json.dumps({"about": about, "choices": dict(sorted(choices.items()))}, indent=1) + "\n", encoding="utf-8")
    return 0
