"""Decide everything before anything is computed, in a form that can be printed and compared."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from neuronmlp_plugin.calibration.text import (
    check_positions,
    hold_out,
    load_tokenizer,
    read_windows,
    spread,
    windows_digest,
)
from neuronmlp_plugin.checkpoint.hub import files_to_copy
from neuronmlp_plugin.checkpoint.loader import build_skeleton
from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE, Checkpoint, dense_block
from neuronmlp_plugin.checkpoint.writer import check_new, layer_prefix, partial_folder
from neuronmlp_plugin.compressor.footprint import Footprint, available_bytes
from neuronmlp_plugin.compressor.job import apart_from_paths
from neuronmlp_plugin.compressor.origin import base_digest, digest, weights_digest
from neuronmlp_plugin.compressor.settings import Settings
from neuronmlp_plugin.errors import CalibrationError, CheckpointError, OutputError, UsageError
from neuronmlp_plugin.lowrank.allocate import Curve, Level, check_removable, most_removable, uniform
from neuronmlp_plugin.models.factors import PROJECTIONS, MLPShape, divisors

_FP32 = 4
_LAYOUT = 5  # of the files in the analysis folder
QUANTUM = 16  # channels of a group that go at a time
LEAST_CHANNELS = 1 / 3  # of a layer: with fewer, summed losses predict nothing
FACTORED_LEVELS = 6  # at about so many counts of channels factors are offered too, besides at all of them
# What a measured allocation looks at: so many calibration windows, and of each the beginning, since attention
# over all of it would be most of the pass on a CPU.
MEASURED_WINDOWS, MEASURED_LENGTH = 32, 256


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked compression: the opened model, its token windows, and what the run will need."""

    settings: Settings
    base: Checkpoint
    shape: MLPShape
    calibration: torch.Tensor  # [windows, S]
    judge: torch.Tensor  # [windows, S], disjoint from `calibration`; may be empty
    metric_windows: int
    groups: int = 1

    @functools.cached_property
    def levels(self) -> tuple[int, ...]:
        """How many channels a layer may keep, from all of them down."""
        return _levels(self.settings, self.shape, self.groups)

    @functools.cached_property
    def factored_levels(self) -> tuple[int, ...]:
        """At which of these its matrices may have factors."""
        return _factored(self.settings, self.levels)

    @property
    def target(self) -> pathlib.Path:
        """The folder that must not exist yet: the checkpoint, or the factor file's own inside `out`."""
        return self.settings.out / FACTOR_FILE.parent if self.settings.factors_only else self.settings.out

    @property
    def work(self) -> pathlib.Path:
        """Where an unfinished run keeps what it has: beside the target, on its file system."""
        return partial_folder(self.target)

    @property
    def mlp_parameters(self) -> int:
        h, i, layers = self.shape.hidden_size, self.shape.intermediate_size, self.shape.num_layers
        return 3 * h * i * layers

    @property
    def measured(self) -> torch.Tensor:
        """`[windows, S]`: the text on which a measured allocation measures; empty for the others."""
        if self.settings.allocation != "measured":
            return self.calibration[:0]
        return spread(self.calibration, MEASURED_WINDOWS)[:, :MEASURED_LENGTH]

    @property
    def memory_bytes(self) -> int:
        """The peak of a process, over all stages."""
        return max(self.footprint().stages().values())

    def footprint(self) -> Footprint:
        shapes = self.base.shapes()
        layer = sum(math.prod(size) for name, size in shapes.items() if name.startswith(layer_prefix(0)))
        metric_tokens = self.metric_windows * self.settings.window
        vocabulary = shapes["model.embed_tokens.weight"][0]
        tokens = (self.calibration.numel(), metric_tokens, self.measured.numel(), self.judge.numel())
        return Footprint(
            self.shape, layer, vocabulary, self.settings.window, *tokens, self.settings.removes_channels
        )

    @property
    def disk_bytes(self) -> int:
        """Room for metrics (fp64), moments and judged states (fp32); inputs of the backward pass, or later
        layers as chosen; hidden states, or later inputs to measure gains on; and the result.
        """
        h, i, layers = self.shape.hidden_size, self.shape.intermediate_size, self.shape.num_layers
        metrics = layers * (h * h + 2 * i) * 8 if self.metric_windows else 0
        moments = (layers * (h * h + i * i) + self.judge.numel() * h) * _FP32
        inputs = (layers + 3) * self.metric_windows * self.settings.window * h * _FP32
        chosen = layers * 6 * h * i * _FP32
        hidden = max(2 * (self.calibration.numel() + self.judge.numel()), layers * self.measured.numel())
        model = sum(path.stat().st_size for path in self.base.files)
        return metrics + moments + max(inputs, chosen) + hidden * h * _FP32 + model

    @property
    def analysis(self) -> pathlib.Path:
        """Where statistics and decompositions are kept: apart where the user wants them again, else with the
        unfinished run.
        """
        return self.settings.analysis or self.work / "analysis"

    def fingerprint(self) -> str:
        """Changes with anything that changes the result: an unfinished run is resumed only under the same
        one.
        """
        return digest(
            {"settings": apart_from_paths(self.settings.to_json()), "analysis": self.analysis_fingerprint()}
        )

    def analysis_fingerprint(self) -> str:
        """Changes with anything that changes the statistics: the text, the dense weights, the method; not
        with size or form.
        """
        text = [windows_digest(self.calibration), windows_digest(self.judge)]
        return digest([_LAYOUT, self.settings.analysis_json(), weights_digest(self.base), text])

    def rows(self) -> list[tuple[str, str]]:
        """What `--dry-run` prints."""
        s, shape = self.settings, self.shape
        return [
            ("model", f"{self.base.folder}  ({self.base.config['architectures'][0]})"),
            ("layers", f"{shape.num_layers}, H {shape.hidden_size}, I {shape.intermediate_size}"),
            ("MLPs", f"{self.mlp_parameters / 1e6:.1f} M parameters"),
            ("take away", self._size_row()),
            (
                "method",
                f"{s.method}, allocation {s.allocation}, form {s.form}, rank multiple {s.rank_multiple}",
            ),
            ("groups", self._groups_row()),
            (
                "calibration",
                f"{self.calibration.numel():,} tokens in {len(self.calibration)} windows; backward pass on "
                f"{self.metric_windows} of them",
            ),
            ("judged on", f"{self.judge.numel():,} tokens that are not calibrated on"),
            ("memory", f"about {self.memory_bytes / 2**30:.1f} GiB"),
            ("disk", f"about {self.disk_bytes / 2**30:.1f} GiB while it runs"),
            ("output", str(self.target)),
        ]

    def _groups_row(self) -> str:
        """Which tensor-parallel sizes the folder will serve as a dense one would be served."""
        channels = (
            math.gcd(self.shape.intermediate_size, QUANTUM * self.groups)
            if self.settings.removes_channels
            else 0
        )
        fits = divisors(self.groups if self.settings.form != "narrow" else channels)
        more = "; channels may be removed" if self.settings.removes_channels else ""
        return f"{self.groups}: full speed at tensor parallel size {', '.join(map(str, fits))}{more}"

    def _size_row(self) -> str:
        s = self.settings
        if s.target is not None:
            return (
                f"as much as keeps {s.target} on the text judged on, by about 8 probes; the stored tensors "
                "have to keep it too"
            )
        if s.faster is not None:
            return (
                f"as little as makes the MLPs {s.faster:g} times faster in decode, simulated: one token, one "
                "core of trn1, bf16"
            )
        assert s.remove is not None
        return f"{s.remove:.1%} of them: {s.remove * self.mlp_parameters / 1e6:.1f} M"


def make_plan(settings: Settings) -> Plan:
    """Open and check everything that a run will touch. Raises the errors of the parts, each naming its
    file.
    """
    base = Checkpoint(settings.model)
    if base.block is not None:
        raise CheckpointError(
            f"{settings.model}: expected a dense model, found one that is factored already; compress the "
            "original."
        )
    shape = dense_block(base).shape
    build_skeleton(base)  # a config that transformers builds no model of is told before the text is read,
    files_to_copy(base.folder)  # and a file that cannot go with the result before the work
    check_positions(settings.window, base.config)
    groups = _groups(settings, shape)
    _check_size(settings, shape, groups)
    calibration, judge = _windows(settings, shape, base.shapes()["model.embed_tokens.weight"][0])
    metric_windows = (
        min(max(1, settings.metric_tokens // settings.window), len(calibration))
        if settings.method == "two-sided"
        else 0
    )
    plan = Plan(settings, base, shape, calibration, judge, metric_windows, groups)
    check_new(plan.target)
    _check_places(plan)
    _check_room(plan)
    return plan


def _windows(settings: Settings, shape: MLPShape, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    empty = torch.zeros(0, settings.window, dtype=torch.long)
    if settings.text is None:
        return empty, empty
    tokenizer = load_tokenizer(settings.model)
    wanted = settings.tokens + settings.judge_tokens
    windows = read_windows(settings.text, tokenizer, settings.window, wanted, vocabulary)
    pool, judge = hold_out(windows, settings.judge_tokens)
    wanted = min(max(1, settings.tokens // settings.window), len(pool))
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(settings.seed))[:wanted]
    calibration = pool[order.sort().values]
    if settings.target is not None and not len(judge):
        raise CalibrationError(
            f"{settings.text}: expected a window to judge --target on, found only {len(windows)} windows, of "
            "which an eighth at most are "
            "judged on; give more text or a smaller --window."
        )
    if settings.method == "plain":
        return empty, judge
    _check_enough(settings, shape, calibration.numel())
    return calibration, judge


def _check_enough(settings: Settings, shape: MLPShape, found: int) -> None:
    """Fewer tokens than twice the wider side leave the input moment singular in many directions, and the fit
    goes wild there.
    """
    needed = 2 * max(shape.hidden_size, shape.intermediate_size)
    if found < needed:
        raise CalibrationError(
            f"{settings.text}: expected at least {needed:,} calibration tokens (twice the intermediate "
            f"size), found {found:,}; give more text or raise --tokens."
        )


def _nearest(possible: Sequence[int], asked: int) -> str:
    """The possible numbers on either side of one that is not."""
    below, above = [n for n in possible if n < asked][-1:], [n for n in possible if n > asked][:1]
    return " and ".join(map(str, below + above))


def _groups(settings: Settings, shape: MLPShape) -> int:
    """Into how many groups the channels are dealt."""
    channels, tp, asked = shape.intermediate_size, settings.tp, settings.groups
    if channels % tp:
        raise UsageError(
            f"--tp {tp}: expected a divisor of the {channels} intermediate channels, found {tp}; "
            f"nearest: {_nearest(divisors(channels), tp)}."
        )
    if asked is not None:
        possible = [g for g in divisors(channels) if g % tp == 0]
        if asked not in possible:
            raise UsageError(
                f"--groups {asked}: expected a divisor of the {channels} intermediate channels that is a "
                f"multiple of --tp {tp}, found {asked}; nearest: {_nearest(possible, asked)}; or give auto."
            )
        return asked
    if settings.method != "two-sided" or settings.form == "narrow":
        return tp
    # nearest to square: in a slice [I / g, H] that is, no rank is dear
    square = channels / shape.hidden_size
    return min((g for g in divisors(channels) if g % tp == 0), key=lambda g: abs(math.log(square / g)))


def _levels(settings: Settings, shape: MLPShape, groups: int) -> tuple[int, ...]:
    # A step takes as many channels from every group, so that groups stay equal.
    channels, step = shape.intermediate_size, QUANTUM * groups
    least = math.ceil(LEAST_CHANNELS * channels / step) * step
    # From channels - 1: all of them are a level by themselves, also where they are a multiple of the step.
    fewer = range((channels - 1) // step * step, least - 1, -step)
    return (channels, *(fewer if settings.removes_channels else ()))


def _factored(settings: Settings, levels: tuple[int, ...]) -> tuple[int, ...]:
    if settings.form == "narrow":
        return ()
    step = max(1, round((len(levels) - 1) / FACTORED_LEVELS))
    return (levels[0], *levels[step::step])


def _check_size(settings: Settings, shape: MLPShape, groups: int) -> None:
    """What no allocation could reach is refused before the analysis: what the cheapest choices cost does not
    hang on losses.
    """
    if settings.remove is None:
        return
    levels = _levels(settings, shape, groups)
    factored = _factored(settings, levels)
    layer = [_any_level(shape, k, groups, k in factored) for k in levels]
    keep, form, multiple = 1.0 - settings.remove, settings.form, settings.rank_multiple
    if settings.allocation == "uniform":
        uniform([layer], keep, form, multiple)
    else:
        check_removable(1.0 - most_removable([layer], form, multiple), keep, form, multiple)


def _any_level(shape: MLPShape, channels: int, groups: int, is_factored: bool) -> Level:
    """A level of some losses: convex, so that every rank is worth offering."""
    h, part = shape.hidden_size, channels // groups
    tail = (
        np.linspace(1.0, 0.0, min(h, part) + 1) ** 2
        if is_factored
        else np.append(np.full(min(h, part), np.inf), 0.0)
    )
    sides = ((h, part) if name == "down_proj" else (part, h) for name in PROJECTIONS)
    removal = float(shape.intermediate_size - channels)
    return Level(channels, removal, tuple(Curve(out, n_in, tail, groups) for out, n_in in sides))


def _check_places(plan: Plan) -> None:
    """The output appears by a rename, so nothing else may lie where it will be, or where the unfinished run
    is.
    """
    if plan.settings.analysis is None:
        return
    around = plan.settings.analysis.resolve()
    if {plan.target.resolve(), plan.work.resolve()} & {around, *around.parents}:
        raise UsageError(
            f"--analysis {plan.settings.analysis}: expected a folder outside --out, found one inside; name "
            "another."
        )


def _check_room(plan: Plan) -> None:
    if available_bytes() < plan.memory_bytes:
        raise UsageError(
            f"{plan.settings.model}: expected a machine with {plan.memory_bytes / 2**30:.1f} GiB of memory, "
            "found "
            f"{available_bytes() / 2**30:.1f} GiB; lower --tokens, --metric-tokens or --window, or use a "
            "larger machine."
        )
    parent = plan.settings.out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    here = {path for place in (plan.work, plan.analysis) for path in place.rglob("*") if path.is_file()}
    # What an earlier run left need not find room again.
    needed = plan.disk_bytes - sum(path.stat().st_size for path in here)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{parent}: expected {needed / 2**30:.1f} GiB of free disk, found {free / 2**30:.1f} GiB; free "
            "some or choose another --out."
        )


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as JSON, for the report and the checkpoint's provenance."""
    return {
        **plan.settings.to_json(),
        "calibration_tokens": plan.calibration.numel(),
        "calibration_digest": windows_digest(plan.calibration),
        "base_digest": base_digest(plan.base),
    }
