"""Whole models, step by step and core count by core count, for `neuronmlp bench layers`. Simulated
throughout.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

from neuronmlp_plugin.bench.arguments import Write, say
from neuronmlp_plugin.bench.rows import Row
from neuronmlp_plugin.errors import UsageError
from nki_kernels.cost import mlp_forms
from nki_kernels.cost.constants import SETS
from nki_kernels.cost.interconnect import COLLECTIVES
from nki_kernels.cost.mlp_forms import Blend
from nki_kernels.cost.models import MODELS, ModelShape
from nki_kernels.cost.tensor_parallel import Setting
from nki_kernels.cost.transformer import Parts, Step, amdahl, step_time
from nki_kernels.targets import TARGETS

CORES = (1, 2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Compared:
    """One step of one model on `tp` cores: dense, and each form that the budget allows, by name."""

    model: str
    tp: int
    step: str
    dense: Parts
    forms: dict[str, Parts]

    def gain(self, form: str) -> float:
        """Dense over a form."""
        return self.dense.total / self.forms[form].total

    def line(self, names: list[str], best: str) -> str:
        """As printed under `heading`; `best`: the form that the model would be stored in for this many
        cores.
        """
        gains = "".join(f"{self.gain(name):>15.3f}" if name in self.forms else f"{'-':>15}" for name in names)
        parts = self.forms[best]
        collectives = (parts.mlp_collectives + parts.attention_collectives) / parts.total
        bound = f"{amdahl(self.dense.mlp_share):>8.2f}{parts.mlp / parts.total:>6.0%}{collectives:>13.0%}"
        return (
            f"{self.model:<14}{self.tp:>3} "
            f"{self.step:<13}{self.dense.total:>10.0f}{gains}{self.gain(best):>8.3f}  {best:<15}{bound}"
        )

    def rows(self, where: str) -> list[Row]:
        case = f"layers {self.model} tp={self.tp} {self.step}"
        totals = {"dense": self.dense.total, **{name: parts.total for name, parts in self.forms.items()}}
        return [
            Row(f"{case} {name}", "simulated_us", "us", value, "simulated", where)
            for name, value in totals.items()
        ]


def heading(names: list[str]) -> str:
    """Of the table: speed-ups over dense, the best form, Amdahl's bound, and its shares of the best's
    time.
    """
    return (
        f"{'model':<14}{'tp':>3} {'step':<13}{'dense us':>10}{''.join(f'{name:>15}' for name in names)}"
        f"{'best':>8}  {'form':<15}{'Amdahl':>8}{'MLP':>6}{'collectives':>13}"
    )


def best_form(compared: list[Compared]) -> str:
    """The form whose least gain over the steps of one core count is the largest: one folder serves them
    all.
    """
    names = compared[0].forms
    return max(names, key=lambda name: min(item.gain(name) for item in compared))


def steps_of(prompt: int, batches: list[int]) -> dict[str, Step]:
    """A prefill of one prompt, and decode steps behind it."""
    return {"TTFT": Step(1, prompt, prompt)} | {f"TPOT batch {n}": Step(n, 1, prompt) for n in batches}


def forms_of(shape: ModelShape, tp: int, removed_ratio: float) -> dict[str, Blend]:
    """The forms that a budget allows; on one core `gather` is what the one group is already. Raises
    UsageError where it allows none.
    """
    found = {}
    reasons = []
    for name, make in mlp_forms.FORMS.items():
        if tp == 1 and name.startswith("gather"):
            continue
        try:
            found[name] = make(shape, tp, removed_ratio)
        except ValueError as error:
            reasons.append(str(error))
    if not found:
        raise UsageError(f"--remove {removed_ratio}: {shape.name} on {tp} cores: {reasons[0]}")
    return found


def compare(
    shape: ModelShape, removed_ratio: float, steps: dict[str, Step], setting: Setting
) -> list[Compared]:
    """All steps of a model on one number of cores. Raises UsageError where tp does not divide it or nothing
    fits.
    """
    reason = shape.why_not_on(setting.tp)
    if reason:
        raise UsageError(f"--tp {setting.tp}: {reason}")
    forms = forms_of(shape, setting.tp, removed_ratio)
    found = []
    for label, step in steps.items():
        try:
            dense = step_time(shape, mlp_forms.dense(shape, setting.tp), step, setting)
            parts = {name: step_time(shape, mlp, step, setting) for name, mlp in forms.items()}
        except ValueError as error:
            raise UsageError(f"{shape.name}, tp {setting.tp}, {label}: {error}") from error
        found.append(Compared(shape.name, setting.tp, label, dense, parts))
    return found


def cores_of(args: argparse.Namespace, shape: ModelShape) -> list[int]:
    """The core counts that are asked for, or the usual ones."""
    return args.tp or [n for n in CORES if n >= shape.least_tp]


def setting_of(args: argparse.Namespace, tp: int) -> Setting:
    """What the options say of target, constants and collectives."""
    return Setting(TARGETS[args.target], SETS[args.constants], COLLECTIVES[args.collectives], tp)


def cases(args: argparse.Namespace) -> Iterator[list[Compared]]:
    """Every model and core count."""
    steps = steps_of(args.prompt, args.batch)
    for shape in (MODELS[name] for name in args.models):
        for tp in cores_of(args, shape):
            yield compare(shape, args.remove, steps, setting_of(args, tp))


def report(args: argparse.Namespace, write: Write = say) -> list[Compared]:
    """All models and core counts, a line for each step as it is done."""
    names = [*mlp_forms.FORMS]
    write(f"simulated, {where(args)}, bf16, removed_ratio {args.remove}, {args.prompt} tokens of prompt")
    write(heading(names))
    done = []
    for compared in cases(args):
        best = best_form(compared)
        for item in compared:
            write(item.line(names, best))
        done += compared
    return done


def where(args: argparse.Namespace) -> str:
    """What the numbers were made with."""
    return f"{args.target}, constants {args.constants}, collectives {args.collectives}"
