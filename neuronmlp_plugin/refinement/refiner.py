"""Carry a refinement out: each stage turns a checkpoint into a checkpoint, and the one nearest to the dense
model is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import torch

from neuronmlp_plugin.calibration.layer_stream import LayerStream, best_device
from neuronmlp_plugin.calibration.quality import Judge, Quality
from neuronmlp_plugin.calibration.template import bos_prefix
from neuronmlp_plugin.calibration.text import (
    hold_out,
    load_tokenizer,
    read_windows,
    rewindow,
    spread,
    windows_digest,
)
from neuronmlp_plugin.checkpoint.digests import is_whole, loaded_files
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint, dense_block, open_dense
from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.checkpoint.writer import (
    alone_in,
    check_new,
    copy_files,
    layer_prefix,
    move_whole,
    partial_folder,
    write_layer,
    write_record,
    write_rest,
)
from neuronmlp_plugin.compressor.exhibits import sample_texts
from neuronmlp_plugin.compressor.int8_folder import MOMENT_TOKENS, int8_block, write_int8
from neuronmlp_plugin.compressor.job import ProgressBars, Workspace, apart_from_paths
from neuronmlp_plugin.compressor.origin import check_made_from, digest, weights_digest
from neuronmlp_plugin.errors import CalibrationError, CheckpointError, UsageError
from neuronmlp_plugin.models.definition import quantize
from neuronmlp_plugin.models.factors import SCALE
from neuronmlp_plugin.refinement.descent import chosen, mlp_linears
from neuronmlp_plugin.refinement.objectives import BlockStreams, distill, teacher_states, visits
from neuronmlp_plugin.refinement.refine_settings import RefineSettings
from neuronmlp_plugin.reporting.folder import REPORT_FILE, read_report, write_report
from neuronmlp_plugin.reporting.run_report import Report

JUDGE_WINDOW = 1024  # tokens; longer than the training windows, as served contexts are


@dataclasses.dataclass(frozen=True)
class RefinePlan:
    """A checked refinement: both folders opened, the text cut."""

    settings: RefineSettings
    source: Checkpoint
    dense: Checkpoint
    windows: torch.Tensor  # [n, S] to train on
    judge: torch.Tensor  # [n, JUDGE_WINDOW], after the end of what is trained on

    @functools.cached_property
    def block(self) -> FormatBlock:
        """Of the result."""
        stored = self.source.block or dense_block(self.source)
        if self.settings.is_int8:
            return int8_block(stored)
        # A narrow folder without a block has its own size in its config; the base's is in the dense one's.
        return stored if self.source.block else FormatBlock(stored.layers, dense_block(self.dense).shape)

    def moving(self, model: torch.nn.Module, index: int | None = None) -> dict[str, Any]:
        """What is trained of the whole model, or of layer `index`: all weights of each MLP that is not the
        dense model's own; of all where they become int8.
        """
        layers = range(len(self.block.layers)) if index is None else (index,)
        base = dense_block(self.dense).shape
        moved = [i for i in layers if self.settings.is_int8 or not self.block.layers[i].is_base(base)]
        if index is not None:
            return mlp_linears(model) if moved else {}
        prefixes = tuple(layer_prefix(i) for i in moved)
        return {name: linear for name, linear in mlp_linears(model).items() if name.startswith(prefixes)}

    @property
    def work(self) -> pathlib.Path:
        """Where an unfinished run keeps what it has."""
        return partial_folder(self.settings.out)

    def fingerprint(self) -> str:
        """Changes with anything that changes the result: an unfinished run is resumed only under the same
        one.
        """
        text = [windows_digest(self.windows), windows_digest(self.judge)]
        settings = apart_from_paths(self.settings.to_json())
        return digest([settings, *map(weights_digest, (self.source, self.dense)), text])

    def rows(self) -> list[tuple[str, str]]:
        """What is printed before the run."""
        s = self.settings
        by = "perplexity" if s.loss == "next-token" else "KL"
        rate = f"{s.learning_rate:g}" if s.learning_rate else "by how far the model is from the dense one"
        return [
            ("refine", f"{self.source.folder}, made from {self.dense.folder}"),
            ("how", s.describe()),
            (
                "trains on",
                f"{s.tokens:,} tokens, of a text of {self.windows.numel():,}; {s.batch * s.window:,} a step, "
                f"{s.arithmetic} products",
            ),
            ("learning rate", rate),
            (
                "judged on",
                f"{self.judge.numel():,} tokens that are not trained on; the best by {by} of before and "
                "after each stage is kept",
            ),
            ("output", str(s.out)),
        ]


def make_plan(settings: RefineSettings) -> RefinePlan:
    """Open and check all that a run will touch. Raises the errors of the parts, each naming its file."""
    source, dense = Checkpoint(settings.model), open_dense(settings.dense)
    # A folder without a block may still be compressed, to fewer channels in all layers: then shapes differ.
    if source.block is None and source.shapes() == dense.shapes():
        raise CheckpointError(
            f"{settings.model}: expected a folder that `compress` wrote, found a dense one; compress it "
            "first."
        )
    if source.block is not None and source.block.has_int8:
        raise CheckpointError(
            f"{settings.model}: expected factors in floating point, found int8; refine first, then quantise."
        )
    check_made_from(source, dense)
    if settings.model.resolve() in settings.out.resolve().parents:
        raise UsageError(
            f"--out {settings.out}: expected a folder outside {settings.model}, found one inside; name "
            "another."
        )
    check_new(settings.out)
    # The plan and the report say which it is.
    settings = dataclasses.replace(settings, arithmetic=chosen(settings.arithmetic))
    return RefinePlan(
        settings, source, dense, *_windows(settings, dense.shapes()["model.embed_tokens.weight"][0])
    )


def _windows(settings: RefineSettings, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training windows, and judging windows from the text's end."""
    tokenizer = load_tokenizer(settings.dense)
    length = max(JUDGE_WINDOW, settings.window)
    if settings.judge_tokens < length:
        raise UsageError(
            f"--judge-tokens: expected at least one window of {length:,} tokens, found "
            f"{settings.judge_tokens:,}."
        )
    pool, judge = hold_out(
        read_windows(settings.text, tokenizer, length, settings.tokens + settings.judge_tokens, vocabulary),
        settings.judge_tokens,
    )
    if not len(judge):
        raise CalibrationError(
            f"{settings.text}: expected at least {8 * length:,} tokens, so that some can judge, found fewer; "
            "give more."
        )
    short = rewindow(pool, settings.window, len(bos_prefix(tokenizer)))
    order = torch.randperm(len(short), generator=torch.Generator().manual_seed(settings.seed))
    kept = order[: max(1, settings.tokens // settings.window)]  # all of them, if they are too few
    return short[kept], judge


@dataclasses.dataclass(frozen=True)
class Run:
    """A refinement under way; `work` keeps what is finished."""

    plan: RefinePlan
    work: Workspace
    bars: ProgressBars

    def folder(self, name: str) -> pathlib.Path:
        """An empty folder, whatever an interrupted run has left there."""
        folder = self.work.path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def once(self, stage: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What became of a stage: made now, or by a run that was interrupted after it."""
        folder = self.work.path / stage
        return self.work.once(stage, lambda: {"stage": stage, **make()}, lambda _: is_whole(folder))


def refine(plan: RefinePlan, bars: ProgressBars) -> Report:
    """Refine into `settings.out`, which appears whole or not at all; returns the report (that of `compress`,
    with `refinement`).

    An interrupted run goes on from its last finished stage, or inside `distill` from the last steps kept, to
    an identical result.
    """
    run = Run(plan, Workspace(plan.work, plan.fingerprint()), bars)
    with alone_in(run.work.path):
        return _finish(run)


def _finish(run: Run) -> Report:
    """All stages, then the better of before and after them where it belongs."""
    plan = run.plan
    judge, badness = _judge(run), functools.partial(_badness, plan.settings)
    tried = [run.once("before", functools.partial(_before, run, judge))]
    # What is rounded already has nothing left to train between two integers.
    start, best = plan.source, Checkpoint(run.work.path / "before")
    for stage in plan.settings.stages:
        tried.append(run.once(stage, functools.partial(_stage, run, stage, start, tried, judge)))
        if badness(tried[-1]) == min(map(badness, tried)):
            start = best = Checkpoint(run.work.path / stage)
    report = _report(run, best, tried)
    if (plan.source.folder / REPORT_FILE).is_file():  # else there is nothing to say of the matrices
        write_report(best.folder, report)
    move_whole(best.folder, plan.settings.out)
    shutil.rmtree(run.work.path)
    return report


def _before(run: Run, judge: Callable[[Checkpoint], Quality]) -> dict[str, Any]:
    """What is kept where training does not help: the source, in the storage that was asked for."""
    plan, target = run.plan, run.folder("before")
    if plan.settings.is_int8:
        windows = spread(plan.windows, MOMENT_TOKENS // plan.settings.window)
        write_int8(target, plan.source, plan.block, windows, run.bars)
        _write_rest(plan, plan.source, target)
    else:
        copy_files(loaded_files(plan.source.folder), plan.source.folder, target)
        write_record(target)
    return {"quality": judge(Checkpoint(target)).to_json(), "losses": []}


def _stage(
    run: Run,
    stage: str,
    source: Checkpoint,
    tried: list[dict[str, Any]],
    judge: Callable[[Checkpoint], Quality],
) -> dict[str, Any]:
    settings, target = run.plan.settings, run.folder(stage)
    torch.manual_seed(settings.seed)  # here: a resumed run may not have been through the stages before
    divergence = min(map(_divergence, tried))
    rate = settings.rate_for(divergence)
    losses = _STAGES[stage](run, source, target, rate, settings.text_share_for(divergence))
    return {"learning_rate": rate, "quality": judge(Checkpoint(target)).to_json(), "losses": losses}


def _divergence(entry: dict[str, Any]) -> float:
    return float(entry["quality"]["kl_divergence"])


def _badness(settings: RefineSettings, entry: dict[str, Any]) -> float:
    """By which the better one is kept. The next-token loss alone leaves the dense model on purpose."""
    if settings.loss == "next-token":
        return float(entry["quality"]["candidate_perplexity"])
    return _divergence(entry)


def _judge(run: Run) -> Callable[[Checkpoint], Quality]:
    """A function that judges a checkpoint against the dense model, which runs once."""
    dense = LayerStream(run.plan.dense, device=best_device())
    with run.bars.stage("dense model, judged text", dense.num_layers) as tick:
        judge = Judge(dense, run.plan.judge, tick)

    def quality(candidate: Checkpoint) -> Quality:
        with run.bars.stage("quality", dense.num_layers) as tick:
            return judge.compare(LayerStream(candidate, device=best_device()), tick)

    return quality


def _refine_blocks(
    run: Run, source: Checkpoint, target: pathlib.Path, rate: float, share: float
) -> list[float]:
    """Stage `blocks`; its losses are each layer's held-out error."""
    plan = run.plan
    dense, compressed = (LayerStream(folder, device=best_device()) for folder in (plan.dense, source))
    streams = BlockStreams(dense, compressed, plan.windows, plan.judge)
    errors = []
    with run.bars.stage("blocks", streams.dense.num_layers) as tick:
        for index in range(streams.dense.num_layers):
            moving = functools.partial(plan.moving, index=index)
            refined, error = streams.refine_layer(index, moving, rate, plan.settings)
            named = {f"{layer_prefix(index)}{name}": tensor for name, tensor in refined.items()}
            _write_layer(plan, target, source, index, named)
            errors.append(error)
            tick(1)
    _write_rest(plan, source, target)
    return errors


def _distill(run: Run, source: Checkpoint, target: pathlib.Path, rate: float, share: float) -> list[float]:
    """Stage `distill`; its losses are each step's, per token."""
    plan, settings = run.plan, run.plan.settings
    teacher = None if settings.loss == "next-token" else _teacher(run)
    student = load_model(source.folder)
    linears = list(plan.moving(student).values())
    with run.bars.stage("distill", len(visits(len(plan.windows), settings))) as tick:
        losses = distill(student, linears, teacher, plan.windows, rate, share, settings, run.work, tick)
    state = student.state_dict()
    for index in range(len(student.model.layers)):
        prefix = f"{layer_prefix(index)}mlp."
        refined = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        _write_layer(plan, target, source, index, refined)
    _write_rest(plan, source, target)
    return losses


def _teacher(run: Run) -> torch.Tensor:
    """What the dense model says to the training windows: a quarter of the work, so kept for a run that goes
    on.
    """
    if not run.work.has("teacher"):
        dense = LayerStream(run.plan.dense, device=best_device())
        with run.bars.stage("dense model's outputs", dense.num_layers) as tick:
            run.work.save(
                "teacher", {"states": teacher_states(dense, run.plan.windows, run.plan.settings, tick)}
            )
    return run.work.load("teacher")["states"]


_STAGES = {"blocks": _refine_blocks, "distill": _distill}


def _write_layer(
    plan: RefinePlan, target: pathlib.Path, source: Checkpoint, index: int, refined: dict[str, torch.Tensor]
) -> None:
    """One layer. Refined tensors take the dtype in which the result is stored, which they have been trained
    in; what was not refined is copied.
    """
    tensors = {}
    for projection, matrix in plan.block.layers[index].matrices.items():
        for suffix in matrix.tensor_shapes():
            name = f"{layer_prefix(index)}mlp.{projection}.{suffix}"
            stored = source.tensor(name)
            weight = refined.get(name, stored)
            if matrix.spec.is_int8:
                tensors[name], tensors[name + SCALE] = quantize(weight)
            else:
                tensors[name] = weight.to(stored.dtype)
    write_layer(target, source, index, tensors)


def _write_rest(plan: RefinePlan, source: Checkpoint, target: pathlib.Path) -> None:
    provenance = {**plan.block.provenance, "refinement": plan.settings.to_json()}
    write_rest(target, source, dataclasses.replace(plan.block, provenance=provenance))


def _report(run: Run, best: Checkpoint, tried: list[dict[str, Any]]) -> Report:
    """The source's report with the block, the quality and the sample texts of what was kept."""
    settings, folder = run.plan.settings, run.plan.source.folder
    report = read_report(folder) if (folder / REPORT_FILE).is_file() else Report({}, [])
    kept = min(tried, key=functools.partial(_badness, settings))
    losses: list[float] = next((entry["losses"] for entry in tried if entry["stage"] == "distill"), [])
    size = settings.batch * settings.window
    history = [{"step": i, "tokens": i * size, "loss": loss} for i, loss in enumerate(losses, start=1)]
    refinement = {
        "method": settings.describe(),
        "kept": kept["stage"],
        "before": tried[0]["quality"],
        "after": kept["quality"],
    }
    block = best.block or run.plan.block
    return dataclasses.replace(
        report,
        block=block.to_json(),
        weight_bytes=block.weight_bytes,
        bytes_ratio=block.bytes_ratio,
        notes=[*report.notes, "The errors of single matrices are those before the refinement."],
        quality=Quality.of(kept["quality"]),
        samples=_samples(run, best, report.samples),
        refinement={**refinement, "history": history, "tried": tried},
    )


def _samples(run: Run, best: Checkpoint, before: dict[str, Any] | None) -> dict[str, Any] | None:
    """New sample texts, as long as those of the source."""
    if before is None:
        return None
    tokenizer = load_tokenizer(run.plan.dense.folder)
    dense, candidate = (LayerStream(folder, device=best_device()) for folder in (run.plan.dense, best))
    with run.bars.stage("sample texts", 2 * before["new_tokens"]) as tick:
        return sample_texts(dense, candidate, tokenizer, before["new_tokens"], tick)
