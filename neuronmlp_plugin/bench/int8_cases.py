"""What int8 weights bring, for `neuronmlp bench int8`: one MLP on one core, and whole models on 1 to 32. Only
MLPs are int8; attention and lm_head stay bf16. Simulated throughout.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

from neuronmlp_plugin.bench.arguments import Write, say
from neuronmlp_plugin.bench.layer_cases import (
    Compared,
    best_form,
    compare,
    cores_of,
    setting_of,
    steps_of,
    where,
)
from neuronmlp_plugin.bench.rows import Row
from neuronmlp_plugin.errors import UsageError
from nki_kernels.cost.baselines import BF16
from nki_kernels.cost.constants import CALIBRATED, SLOW_CASTS, Constants
from nki_kernels.cost.estimate import Estimate
from nki_kernels.cost.launches import price_launch
from nki_kernels.cost.mlp_forms import FORMS, Blend, dense, in_int8
from nki_kernels.cost.models import MODELS
from nki_kernels.cost.transformer import step_time
from nki_kernels.request import stage_request
from nki_kernels.targets import TRN1

MLP_MODELS = ("Llama-3.2-1B", "Qwen3-4B", "Llama-3.1-8B")
MLP_FORMS = ("groups compact", "groups uv", "narrow")
MLP_TOKENS = (1, 4, 16, 64, 2048)
ENGINES = ("tensor", "scalar", "vector", "dma")


@dataclasses.dataclass(frozen=True)
class MLPCase:
    """One MLP in one form with int8 weights, on one core of trn1. `bf16_us`: the same form in bf16;
    `dense_us`: dense in bf16; `slow_us`: int8 if casts took half as long again.
    """

    model: str
    tokens: int
    form: str
    int8: Estimate
    bf16_us: float
    dense_us: float
    slow_us: float

    def line(self) -> str:
        """As printed under MLP_HEAD."""
        us = self.int8.simulated_us
        gains = f"{self.dense_us / us:>9.3f}{self.bf16_us / us:>9.3f}{self.dense_us / self.slow_us:>12.3f}"
        shares = " ".join(f"{name} {self.int8.utilisation(name):.0%}" for name in ENGINES)
        return f"{self.model:<14}{self.tokens:>6} {self.form:<15}{us:>10.1f}{gains}  {shares}"

    def rows(self) -> Iterator[Row]:
        case = f"int8 {self.model} T={self.tokens} {self.form}"
        values = {"int8": self.int8.simulated_us, "bf16": self.bf16_us, "int8, casts 1.5x": self.slow_us}
        for name, value in values.items():
            target = "trn1, constants calibrated"
            yield Row(f"{case} {name}", "simulated_us", "us", value, "simulated", target)


MLP_HEAD = (
    f"{'model':<14}{'tokens':>6} {'form':<15}{'int8 us':>10}{'/dense':>9}{'/bf16':>9}{'casts 1.5x':>12}"
    "  share of the time that each works"
)


def mean_mlp(blend: Blend, tokens: int, constants: Constants) -> Estimate:
    """The mean MLP, in one launch on one core."""
    total = Estimate()
    for share, core in blend:
        (layout,) = core.launches
        found = price_launch(stage_request(layout, tokens, BF16), TRN1, constants).estimate
        total = total + Estimate(share * found.simulated_us, found.busy * share, found.exposed * share)
    return total


def mlp_cases(removed_ratio: float) -> Iterator[MLPCase]:
    """Every model, token count and form."""
    for name in MLP_MODELS:
        shape = MODELS[name]
        blends = {"dense": dense(shape, 1)} | {
            form: FORMS[form](shape, 1, removed_ratio) for form in MLP_FORMS
        }
        for tokens in MLP_TOKENS:
            dense_us = mean_mlp(blends["dense"], tokens, CALIBRATED).simulated_us
            for form, blend in blends.items():
                int8 = in_int8(blend)
                yield MLPCase(
                    name,
                    tokens,
                    form,
                    mean_mlp(int8, tokens, CALIBRATED),
                    mean_mlp(blend, tokens, CALIBRATED).simulated_us,
                    dense_us,
                    mean_mlp(int8, tokens, SLOW_CASTS).simulated_us,
                )


def report_mlps(removed_ratio: float, write: Write = say) -> list[Row]:
    """One MLP: speed over dense bf16 and over the same form in bf16, a line each."""
    write(
        f"simulated, one core of trn1, constants calibrated, removed_ratio {removed_ratio}; speed over dense "
        "bf16, over"
    )
    write("the same form in bf16, and over dense bf16 if casts took 1.5 times as long as documented")
    write(MLP_HEAD)
    rows: list[Row] = []
    for case in mlp_cases(removed_ratio):
        write(case.line())
        rows += case.rows()
    return rows


MODEL_HEAD = (
    f"{'model':<14}{'tp':>3} {'step':<13}{'dense bf16 us':>14}{'dense int8':>12}{'bf16':>9}{'int8':>9}  form"
    "             int8 over dense int8"
)


def _form(wanted: str | None, compared: list[Compared]) -> str:
    """The form asked for, or the best. Raises UsageError where the cores or the budget rule it out."""
    offered = compared[0].forms
    if wanted and wanted not in offered:
        where = f"{compared[0].model} on {compared[0].tp} cores"
        raise UsageError(f"--form {wanted}: {where}: expected one of {', '.join(offered)}")
    return wanted or best_form(compared)


def report_models(args: argparse.Namespace, write: Write = say) -> list[Row]:
    """Whole models against what a user could do instead: dense bf16, dense int8, the same folder in bf16."""
    write(f"simulated, {where(args)}, removed_ratio {args.remove}; speed over dense bf16 of dense int8,")
    write(f"and of {args.form or 'the best form'} in bf16 and int8")
    write(MODEL_HEAD)
    rows: list[Row] = []
    steps = steps_of(args.prompt, args.batch)
    for shape in (MODELS[name] for name in args.models):
        for tp in cores_of(args, shape):
            setting = setting_of(args, tp)
            compared = compare(shape, args.remove, steps, setting)
            form = _form(args.form, compared)
            blends = {
                "dense int8": in_int8(dense(shape, tp)),
                f"{form} int8": in_int8(FORMS[form](shape, tp, args.remove)),
            }
            for item in compared:
                try:
                    times = {
                        n: step_time(shape, b, steps[item.step], setting).total for n, b in blends.items()
                    }
                except ValueError as error:
                    raise UsageError(f"{shape.name}, tp {tp}, {item.step}: {error}") from error
                whole = item.dense.total
                plain, low = times.values()
                numbers = f"{whole:>14.0f}{whole / plain:>12.3f}{item.gain(form):>9.3f}{whole / low:>9.3f}"
                write(f"{shape.name:<14}{tp:>3} {item.step:<13}{numbers}  {form:<15}{plain / low:>15.3f}")
                case = f"layers {shape.name} tp={tp} {item.step} removed {args.remove}"
                rows += [
                    Row(f"{case} {n}", "simulated_us", "us", us, "simulated", where(args))
                    for n, us in times.items()
                ]
    return rows
