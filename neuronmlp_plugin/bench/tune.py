"""`neuronmlp bench tune`: searches tile plans and writes them to a file of your own, which the planner looks
into first where NKI_KERNELS_PLANS names it.

By the cost model (simulated; the planner's own rule comes within a percent of it) or, with --measure, by a
Neuron device's clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from neuronmlp_plugin.argument_types import path, positive, share
from neuronmlp_plugin.bench.arguments import add_model_arguments, one_of
from neuronmlp_plugin.errors import UsageError
from nki_kernels.cost import mlp_forms
from nki_kernels.cost.constants import SETS
from nki_kernels.cost.models import MODELS
from nki_kernels.targets import TARGETS

if TYPE_CHECKING:
    from nki_kernels.cost.search import Found, Measure, Measured
    from nki_kernels.planner import Request


FORMS = {"dense": lambda shape, tp, _removed: mlp_forms.dense(shape, tp), **mlp_forms.FORMS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        default=[*MODELS],
        type=one_of(MODELS),
        metavar="MODEL",
        help=f"of {', '.join(MODELS)} (default: all)",
    )
    parser.add_argument("--out", type=path, required=True, help="table to write; one that exists is added to")
    _add_launches(parser)
    parser.add_argument(
        "--measure",
        action="store_true",
        help="time plans on this machine's Neuron device (never tried on one)",
    )
    add_model_arguments(parser)


def _add_launches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--remove",
        type=share,
        nargs="+",
        default=[0.20],
        metavar="SHARE",
        help="of the MLP parameters (default 0.20)",
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        nargs="+",
        default=["dense", "groups compact"],
        help="how the MLPs are stored (default: dense, and compact with a group a core)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        nargs="+",
        default=[1, 16, 128, 512, 2048, 8192],
        help="per launch (default: 1 ... 8192)",
    )
    parser.add_argument("--tp", type=positive, nargs="+", default=[1, 8], help="cores (default 1 8)")


def _requests(args: argparse.Namespace, model: str) -> Iterator[tuple[int, Request]]:
    """(tp, launch) for every form, removed ratio, core count and token count. Raises UsageError where cores
    do not divide the model or a budget allows no form.
    """
    from nki_kernels.cost.baselines import BF16
    from nki_kernels.request import stage_request

    shape = MODELS[model]
    for name, tp in itertools.product(args.form, args.tp):
        reason = shape.why_not_on(tp)
        if reason:
            raise UsageError(f"--tp {tp}: {reason}")
        for removed in args.remove if name != "dense" else args.remove[:1]:
            try:
                blend = FORMS[name](shape, tp, removed)
            except ValueError as error:
                raise UsageError(
                    f"--remove {removed}: {shape.name} on {tp} cores, {name}: {error}"
                ) from error
            layouts = (layout for _, core in blend for layout in core.launches)
            for layout, tokens in itertools.product(layouts, args.tokens):
                yield tp, stage_request(layout, tokens, BF16)


def _choose(
    request: Request, tp: int, args: argparse.Namespace, measure: Measure | None
) -> tuple[str, dict[str, Any] | None]:
    """A line for the user, and the fields of the choice if there is one."""
    from nki_kernels.cost.search import search, search_measured
    from nki_kernels.planner import Declined

    began = time.perf_counter()
    target, constants = TARGETS[args.target], SETS[args.constants]
    found = (
        search_measured(request, measure, target, constants)
        if measure
        else search(request, target, constants, tp)
    )
    took = f"[{time.perf_counter() - began:.1f} s]"
    if isinstance(found, Declined):
        return f"{took} no plan: {found.reason}", None
    return f"{took} {_result(found)}", dataclasses.asdict(found.choice)


def _result(found: Found | Measured) -> str:
    from nki_kernels.cost.search import Found

    if isinstance(found, Found):
        return (
            f"simulated_us {found.estimate.simulated_us:.1f}, {found.tried} of {found.fitting} plans "
            "scheduled"
        )
    return f"measured_us {found.measured_us:.1f}, {found.tried} of {found.fitting} plans measured"


def _about(args: argparse.Namespace) -> str:
    """Where a table's choices come from."""
    if args.measure:
        from neuronmlp_plugin.serving.trainium.dispatch import installed_nki

        return f"measured on {args.target} with nki {installed_nki()}; neuronmlp bench tune --measure"
    return f"simulated on {args.target} with constants {args.constants}; neuronmlp bench tune"


def _stored(path: pathlib.Path, about: str) -> dict[str, Any]:
    """Choices that are there already. Raises UsageError where they come from elsewhere: one table, one
    origin.
    """
    if not path.exists():
        return {}
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if table["about"] != about:
        raise UsageError(
            f"{path}: expected a table {about!r} to add to, found one {table['about']!r}; name another file "
            "with --out."
        )
    choices: dict[str, Any] = table["choices"]
    return choices


def run(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.bench.device import neuron_runtime, plan_us
    from nki_kernels.plan_file import plan_key

    xla = neuron_runtime() if args.measure else None
    about = _about(args)
    choices = _stored(args.out, about)
    for model in args.models:
        for tp, request in _requests(args, model):
            name = plan_key(request)
            if name in choices:
                continue
            measure = functools.partial(plan_us, xla, request.dtype, tp) if args.measure else None
            line, fields = _choose(request, tp, args, measure)
            print(f"{model} tp={tp} {name}\n    {line}", flush=True)
            if fields is not None:
                choices[name] = fields
            # After every plan: a search of hours can be ended, and goes on from here.
            args.out.write_text(
                json.dumps({"about": about, "choices": dict(sorted(choices.items()))}, indent=1) + "\n",
                encoding="utf-8",
            )
    return 0
