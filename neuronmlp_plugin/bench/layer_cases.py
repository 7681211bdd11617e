"""Whole models, dense and low-rank, step by step, for `neuronmlp bench layers`. Simulated throughout."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator

from neuronmlp_plugin.bench.rows import Row, append_rows
from neuronmlp_plugin.errors import UsageError
from nki_kernels.cost.constants import SETS
from nki_kernels.cost.models import MODELS, rank_at
from nki_kernels.cost.transformer import Parts, Step, amdahl, step_time
from nki_kernels.targets import TARGETS

HEAD = (
    f"{'model':<14}{'tp':>4} {'step':<22}{'dense us':>12}{'low-rank us':>12}{'speed-up':>9}"
    f"{'MLP':>7}{'Amdahl':>8}  low-rank, share of time"
)


@dataclasses.dataclass(frozen=True)
class Compared:
    """One step of one model on `tp` cores, dense and low-rank."""

    model: str
    tp: int
    step: str
    dense: Parts
    low: Parts

    def line(self) -> str:
        """As printed under HEAD."""
        parts = self.low
        shares = {
            "MLP": parts.mlp,
            "its collectives": parts.mlp_collectives,
            "attention": parts.attention + parts.attention_collectives,
        }
        numbers = f"{self.dense.total:>12.0f}{parts.total:>12.0f}{self.dense.total / parts.total:>9.3f}"
        bound = f"{self.dense.mlp_share:>7.0%}{amdahl(self.dense.mlp_share):>8.2f}"
        text = ", ".join(f"{name} {us / parts.total:.0%}" for name, us in shares.items())
        return f"{self.model:<14}{self.tp:>4} {self.step:<22}{numbers}{bound}  {text}"

    def rows(self, form: str, where: str) -> list[Row]:
        case = f"layers {self.model} tp={self.tp} {self.step}"
        totals = {"dense": self.dense.total, form: self.low.total}
        return [
            Row(f"{case} {name}", "simulated_us", "us", value, "simulated", where)
            for name, value in totals.items()
        ]


def _compare(args: argparse.Namespace) -> Iterator[Compared]:
    """Every model, core count and step."""
    target, constants = TARGETS[args.target], SETS[args.constants]
    steps = {"TTFT": Step(1, args.prompt, args.prompt)} | {
        f"TPOT batch {size}": Step(size, 1, args.prompt) for size in args.batch
    }
    for shape, tp, (label, step) in itertools.product(
        (MODELS[name] for name in args.models), args.tp, steps.items()
    ):
        low = ((args.form, rank_at(shape, args.remove)),) * 3
        try:
            dense, parts = (
                step_time(shape, forms, step, tp, target, constants) for forms in ((("dense", 0),) * 3, low)
            )
        except ValueError as error:
            raise UsageError(f"bench layers: {shape.name}, tp {tp}, {label}: {error}") from error
        yield Compared(shape.name, tp, label, dense, parts)


def report(args: argparse.Namespace) -> int:
    """Print as it goes, then append the rows."""
    print(
        f"simulated, {args.target}, bf16, constants {args.constants}, MLPs {args.form} at removed_ratio {args.remove}\n{HEAD}"
    )
    done = []
    for compared in _compare(args):
        print(compared.line(), flush=True)
        done.append(compared)
    if args.csv:
        where = f"{args.target}, constants {args.constants}"
        append_rows(args.csv, (row for compared in done for row in compared.rows(args.form, where)))
    return 0
