"""Carry a refinement out: each stage turns a checkpoint into a checkpoint, and the one nearest to the dense
model is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import torch

from neuronmlp_plugin.calibration.quality import Judge
from neuronmlp_plugin.calibration.stream import LayerStream
from neuronmlp_plugin.calibration.text import (
    bos_prefix,
    hold_out,
    load_tokenizer,
    read_windows,
    rewindow,
    windows_digest,
)
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.writer import (
    alone_in,
    check_new,
    layer_prefix,
    partial_folder,
    save_json,
    write_layer,
    write_rest,
)
from neuronmlp_plugin.compressor.plan import base_digest, digest, weights_digest
from neuronmlp_plugin.compressor.progress import ProgressBars
from neuronmlp_plugin.compressor.samples import sample_texts
from neuronmlp_plugin.compressor.workspace import Workspace
from neuronmlp_plugin.errors import CalibrationError, CheckpointError, UsageError
from neuronmlp_plugin.refinement.arithmetic import chosen
from neuronmlp_plugin.refinement.blocks import BlockStreams
from neuronmlp_plugin.refinement.distill import distill, teacher_states
from neuronmlp_plugin.refinement.settings import RefineSettings
from neuronmlp_plugin.reporting.folder import REPORT_FILE, read_report, write_report

Quality = dict[str, float]
JUDGE_WINDOW = 1024  # tokens; longer than the training windows, as served contexts are


@dataclasses.dataclass(frozen=True)
class RefinePlan:
    """A checked refinement: both folders opened, the text cut."""

    settings: RefineSettings
    source: Checkpoint
    dense: Checkpoint
    windows: torch.Tensor  # [n, S] to train on
    judge: torch.Tensor  # [n, JUDGE_WINDOW], after the end of what is trained on

    @property
    def work(self) -> pathlib.Path:
        """Where an unfinished run keeps what it has."""
        return partial_folder(self.settings.out)

    def fingerprint(self) -> str:
        """Changes with anything that changes the result: an unfinished run is resumed only under the same
        one.
        """
        text = [windows_digest(self.windows), windows_digest(self.judge)]
        return digest([self.settings.to_json(), *map(weights_digest, (self.source, self.dense)), text])

    def rows(self) -> list[tuple[str, str]]:
        """What is printed before the run."""
        s = self.settings
        by = "KL" if s.loss == "kl" else "perplexity"
        return [
            ("refine", f"{self.source.folder}, made from {self.dense.folder}"),
            ("how", s.describe()),
            (
                "trains on",
                f"{self.windows.numel():,} tokens, {s.batch * s.window:,} a step, {s.arithmetic} products",
            ),
            (
                "learning rate",
                f"{s.learning_rate:g}" if s.learning_rate else "by how far the model is from the dense one",
            ),
            (
                "judged on",
                f"{self.judge.numel():,} tokens that are not trained on; the best by {by} of before and after each stage is kept",
            ),
            ("output", str(s.out)),
        ]


def make_plan(settings: RefineSettings) -> RefinePlan:
    """Open and check everything that a run will touch. Raises the errors of the parts, each naming its file."""
    source, dense = Checkpoint(settings.model), Checkpoint(settings.dense)
    if source.block is None or dense.block is not None:
        raise CheckpointError(
            f"{settings.model}: expected a compressed folder, and its dense one as --dense, found them otherwise."
        )
    if source.block.has_int8:
        raise CheckpointError(
            f"{settings.model}: expected factors in floating point, found int8; refine first, then quantise."
        )
    made_from = source.block.provenance.get("base_digest", base_digest(dense))
    if made_from != base_digest(dense):
        raise CheckpointError(
            f"{settings.dense}: expected the dense model that {settings.model} was made from ({made_from}), "
            f"found another ({base_digest(dense)}); name the right folder."
        )
    if settings.model.resolve() in settings.out.resolve().parents:
        raise UsageError(
            f"--out {settings.out}: expected a folder outside {settings.model}, found one inside; name another."
        )
    check_new(settings.out)
    settings = dataclasses.replace(
        settings, arithmetic=chosen(settings.arithmetic)
    )  # the plan and the report say which it is
    return RefinePlan(
        settings, source, dense, *_windows(settings, dense.shapes()["model.embed_tokens.weight"][0])
    )


def _windows(settings: RefineSettings, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training windows in random order, and judging windows from the text's end."""
    tokenizer = load_tokenizer(settings.dense)
    length = max(JUDGE_WINDOW, settings.window)
    if settings.judge_tokens < length:
        raise UsageError(
            f"--judge-tokens: expected at least one window of {length:,} tokens, found {settings.judge_tokens:,}."
        )
    pool, judge = hold_out(
        read_windows(settings.text, tokenizer, length, settings.tokens + settings.judge_tokens, vocabulary),
        settings.judge_tokens,
    )
    if not len(judge):
        raise CalibrationError(
            f"{settings.text}: expected at least {8 * length:,} tokens, so that some can judge, found fewer; give more."
        )
    short = rewindow(pool, settings.window, len(bos_prefix(tokenizer)))
    order = torch.randperm(len(short), generator=torch.Generator().manual_seed(settings.seed))
    return short[order[: max(1, settings.tokens // settings.window)]], judge


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
        path = self.work.path / f"{stage}.json"
        if not path.is_file():
            save_json(path, {"stage": stage, **make()})
        return dict(json.loads(path.read_text(encoding="utf-8")))


def refine(plan: RefinePlan, bars: ProgressBars) -> dict[str, Any]:
    """Refine into `settings.out`, which appears whole or not at all; returns the report (that of `compress`,
    with `refinement`).

    An interrupted run goes on from its last finished stage, or inside `distill` from the last steps kept, to
    an identical result.
    """
    run = Run(plan, Workspace(plan.work, plan.fingerprint()), bars)
    with alone_in(run.work.path):
        return _finish(run)


def _finish(run: Run) -> dict[str, Any]:
    """All stages, then the better of before and after them where it belongs."""
    plan = run.plan
    best, judge, badness = plan.source, _judge(run), functools.partial(_badness, plan.settings)
    tried = [run.once("before", lambda: {"quality": judge(plan.source), "losses": []})]
    for stage in plan.settings.stages:
        rate = plan.settings.rate_for(min(map(_divergence, tried)))
        tried.append(run.once(stage, functools.partial(_stage, run, stage, best, rate, judge)))
        if badness(tried[-1]) == min(map(badness, tried)):
            best = Checkpoint(run.work.path / stage)
    if best is plan.source:
        best = Checkpoint(shutil.copytree(plan.source.folder, run.folder("unchanged"), dirs_exist_ok=True))
    report = _report(run, best, tried)
    if (plan.source.folder / REPORT_FILE).is_file():  # else there is nothing to say of the matrices
        write_report(best.folder, report)
    best.folder.rename(plan.settings.out)
    shutil.rmtree(run.work.path)
    return report


def _stage(
    run: Run, stage: str, source: Checkpoint, rate: float, judge: Callable[[Checkpoint], Quality]
) -> dict[str, Any]:
    torch.manual_seed(
        run.plan.settings.seed
    )  # here: a resumed run may not have been through the stages before
    target = run.folder(stage)
    losses = _STAGES[stage](run, source, target, rate)
    return {"learning_rate": rate, "quality": judge(Checkpoint(target)), "losses": losses}


def _divergence(entry: dict[str, Any]) -> float:
    return float(entry["quality"]["kl_divergence"])


def _badness(settings: RefineSettings, entry: dict[str, Any]) -> float:
    """By which the better one is kept: what was trained for. The next-token loss leaves the dense model on
    purpose.
    """
    return _divergence(entry) if settings.loss == "kl" else float(entry["quality"]["candidate_perplexity"])


def _judge(run: Run) -> Callable[[Checkpoint], Quality]:
    """A function that judges a checkpoint against the dense model, which runs once."""
    dense = LayerStream(run.plan.dense)
    with run.bars.stage("dense model, judged text", dense.num_layers) as tick:
        judge = Judge(dense, run.plan.judge, tick)

    def quality(candidate: Checkpoint) -> Quality:
        with run.bars.stage("quality", dense.num_layers) as tick:
            return judge.compare(LayerStream(candidate), tick).to_json()

    return quality


def _refine_blocks(run: Run, source: Checkpoint, target: pathlib.Path, rate: float) -> list[float]:
    """Stage `blocks`; its losses are each layer's held-out error."""
    plan = run.plan
    streams = BlockStreams(LayerStream(plan.dense), LayerStream(source), plan.windows, plan.judge)
    errors = []
    with run.bars.stage("blocks", streams.dense.num_layers) as tick:
        for index in range(streams.dense.num_layers):
            factors, error = streams.refine_layer(index, rate, plan.settings)
            _write_layer(
                target,
                source,
                index,
                {f"{layer_prefix(index)}{name}": tensor for name, tensor in factors.items()},
            )
            errors.append(error)
            tick(1)
    _write_rest(plan, source, target)
    return errors


def _distill(run: Run, source: Checkpoint, target: pathlib.Path, rate: float) -> list[float]:
    """Stage `distill`; its losses are each step's, per token."""
    plan, settings = run.plan, run.plan.settings
    teacher = _teacher(run) if settings.loss == "kl" else None
    student = load_model(source.folder)
    with run.bars.stage("distill", -(-len(plan.windows) // settings.batch)) as tick:
        losses = distill(student, teacher, plan.windows, rate, settings, run.work, tick)
    state = student.state_dict()
    for index in range(len(student.model.layers)):
        prefix = f"{layer_prefix(index)}mlp."
        _write_layer(
            target, source, index, {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        )
    _write_rest(plan, source, target)
    return losses


def _teacher(run: Run) -> torch.Tensor:
    """What the dense model says to the training windows: a quarter of the work, so kept for a run that goes
    on.
    """
    if not run.work.has("teacher"):
        dense = LayerStream(run.plan.dense)
        with run.bars.stage("dense model's outputs", dense.num_layers) as tick:
            run.work.save(
                "teacher", {"states": teacher_states(dense, run.plan.windows, run.plan.settings, tick)}
            )
    return run.work.load("teacher")["states"]


_STAGES = {"blocks": _refine_blocks, "distill": _distill}


def _write_layer(
    target: pathlib.Path, source: Checkpoint, index: int, refined: dict[str, torch.Tensor]
) -> None:
    """One layer; refined tensors take the dtype in which the source stores them, and what was not refined is
    copied.
    """
    stored = {
        name: source.tensor(name) for name in source.names() if name.startswith(f"{layer_prefix(index)}mlp.")
    }
    write_layer(
        target,
        source,
        index,
        {name: refined.get(name, tensor).to(tensor.dtype) for name, tensor in stored.items()},
    )


def _write_rest(plan: RefinePlan, source: Checkpoint, target: pathlib.Path) -> None:
    assert plan.source.block is not None
    block = plan.source.block
    provenance = {**block.provenance, "refinement": plan.settings.to_json()}
    write_rest(target, source, dataclasses.replace(block, provenance=provenance))


def _report(run: Run, best: Checkpoint, tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The source's report with the block, the quality and the sample texts of what was kept."""
    settings, folder = run.plan.settings, run.plan.source.folder
    report = read_report(folder) if (folder / REPORT_FILE).is_file() else {"matrices": []}
    kept = min(tried, key=functools.partial(_badness, settings))
    losses: list[float] = next((entry["losses"] for entry in tried if entry["stage"] == "distill"), [])
    history = [
        {"step": i, "tokens": i * settings.batch * settings.window, "loss": loss}
        for i, loss in enumerate(losses, start=1)
    ]
    refinement = {
        "method": settings.describe(),
        "kept": kept["stage"],
        "before": tried[0]["quality"],
        "after": kept["quality"],
    }
    assert best.block is not None
    return {
        **report,
        "block": best.block.to_json(),
        "notes": [*report.get("notes", []), "The errors of single matrices are those before the refinement."],
        "quality": kept["quality"],
        "samples": _samples(run, best, report.get("samples")),
        "refinement": {**refinement, "history": history, "tried": tried},
    }


def _samples(run: Run, best: Checkpoint, before: dict[str, Any] | None) -> dict[str, Any] | None:
    """New sample texts, as long as those that the source came with."""
    if before is None:
        return None
    tokenizer = load_tokenizer(run.plan.dense.folder)
    with run.bars.stage("sample texts", 2 * before["new_tokens"]) as tick:
        return sample_texts(
            LayerStream(run.plan.dense), LayerStream(best), tokenizer, before["new_tokens"], tick
        )
