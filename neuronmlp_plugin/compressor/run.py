"""Carry a plan out: analyse, choose ranks, build, write, judge, report. What is finished is never done again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from typing import Any

import torch

from neuronmlp_plugin.calibration.quality import Judge, compare
from neuronmlp_plugin.calibration.stream import LayerStream
from neuronmlp_plugin.calibration.text import load_tokenizer
from neuronmlp_plugin.calibration.workers import Workers
from neuronmlp_plugin.checkpoint.loader import open_folder
from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE
from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.checkpoint.writer import (
    alone_in,
    copy_tokenizer_beside_factors,
    layer_prefix,
    save_json,
    write_factor_file,
    write_layer,
    write_rest,
)
from neuronmlp_plugin.compressor.analyse import analyse
from neuronmlp_plugin.compressor.build import (
    BuiltLayer,
    Layer,
    build_layer,
    choose_ranks,
    priced,
    read_curves,
)
from neuronmlp_plugin.compressor.decode_time import model_us, priced_ranks, rank_prices
from neuronmlp_plugin.compressor.errors import matrix_errors
from neuronmlp_plugin.compressor.marginal import measured_gains, scaled
from neuronmlp_plugin.compressor.plan import Plan, describe
from neuronmlp_plugin.compressor.progress import ProgressBars
from neuronmlp_plugin.compressor.report import loss_by_size, spectra
from neuronmlp_plugin.compressor.samples import sample_texts
from neuronmlp_plugin.compressor.search import SIZES, Search, TruncatedStream
from neuronmlp_plugin.compressor.target import parse_target
from neuronmlp_plugin.compressor.workspace import Workspace, refuse_anothers
from neuronmlp_plugin.lowrank.allocate import Curve, most_removable
from neuronmlp_plugin.models.factors import DENSE, PROJECTIONS, MLPLayer, ProjectionSpec
from neuronmlp_plugin.reporting.card import base_facts
from neuronmlp_plugin.reporting.folder import write_report

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Run:
    """The folders of a run under way: `result` becomes `plan.target` in one rename; `analysis` stays where
    the user keeps it.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        places = (plan.work, plan.fingerprint()), (plan.analysis, plan.analysis_fingerprint())
        for place in places:  # both before either is made: a run that is refused leaves nothing
            refuse_anothers(*place)
        self.work, self.analysis = (Workspace(*place) for place in places)
        self.result = plan.work / "result"
        self.result.mkdir(exist_ok=True)

    def start_over(self) -> None:
        """Forget the layers that were built: other ranks are wanted."""
        for path in self.work.path.glob("built-*.json"):
            path.unlink()
        shutil.rmtree(self.result)
        self.result.mkdir()

    def finish(self) -> None:
        self.plan.target.parent.mkdir(parents=True, exist_ok=True)
        self.result.rename(self.plan.target)
        shutil.rmtree(self.plan.work)


def compress(plan: Plan, bars: ProgressBars) -> dict[str, Any] | None:
    """Compress as planned into `plan.target`, which appears whole or not at all; returns the report.

    An interrupted run goes on from its last finished layer, to an identical result. Of several processes
    (`Workers`) all take part in the analysis; the first does the rest, and the others return None.
    """
    workers = Workers()
    with workers.first_ahead():
        run = Run(plan, workers.device)
    workers.wait()
    shown = bars if workers.is_first else ProgressBars(bars.console, quiet=True)
    with alone_in(run.work.path) if workers.is_first else contextlib.nullcontext():
        # Once an analysis is whole, runs of other sizes may read it side by side.
        with alone_in(run.analysis.path) if workers.is_first else contextlib.nullcontext():
            analyse(plan, run.analysis, shown, workers)
        workers.wait()  # the first removes the folder that the others look into
        return _finish(run, bars) if workers.is_first else None


def _finish(run: Run, bars: ProgressBars) -> dict[str, Any]:
    curves, settings = read_curves(run.plan, run.analysis), run.plan.settings
    if settings.target is not None:
        report = _meet_target(run, curves, settings.target, bars)
    elif settings.faster is not None:
        report = _be_faster(run, curves, settings.faster, bars)
    else:
        assert settings.remove is not None
        report = _make(run, _ranks_for(run, curves, 1.0 - settings.remove, bars), bars)
    report |= {
        "loss_by_size": loss_by_size(curves, settings),
        "spectra": spectra(curves),
        "base": base_facts(run.plan.base.folder),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
    }
    write_report(run.result, report)
    run.finish()
    return report


def _ranks_for(run: Run, curves: list[Curve], keep: float, bars: ProgressBars) -> list[Layer]:
    """The chosen ranks; with `measured`, chosen again under what the first choice turned out to be worth."""
    settings = run.plan.settings
    chosen = choose_ranks(settings, curves, keep)
    if settings.allocation != "measured":
        return chosen
    path = run.work.path / "gains.json"
    if not path.is_file():
        truncated = TruncatedStream(run.plan.base, run.analysis, chosen, run.device)
        save_json(path, measured_gains(truncated, run.plan.measured, run.work, bars))
    ranks = [layer[name].rank for layer in chosen for name in PROJECTIONS]
    return choose_ranks(settings, scaled(curves, ranks, json.loads(path.read_text(encoding="utf-8"))), keep)


def _make(run: Run, chosen: list[Layer], bars: ProgressBars) -> dict[str, Any]:
    """Build, write and judge what `chosen` says; the report of it."""
    records = _build_layers(run, chosen, bars)
    layers = tuple(MLPLayer.of(run.plan.shape, _specs(record)) for record in records)
    block = FormatBlock(layers, run.plan.shape, describe(run.plan), _created_by())
    _write_whole(run, block)
    quality, samples = _judge(run, bars)
    return {
        "block": block.to_json(),
        "weight_bytes": block.weight_bytes,
        "bytes_ratio": block.bytes_ratio,
        "matrices": [row for record in records for row in record["matrices"]],
        "notes": [note for record in records for note in record["notes"]],
        "quality": quality,
        "samples": samples,
    }


def _meet_target(run: Run, curves: list[Curve], asked: str, bars: ProgressBars) -> dict[str, Any]:
    """The largest removal that meets the target both truncated and as stored; its report, with all probes as
    `target`.
    """
    search = Search(run.plan.work / "target.json", asked, parse_target(asked))
    settings = run.plan.settings
    most = most_removable(curves, settings.form, settings.rank_multiple)
    sizes = [size for size in SIZES if size <= most] or SIZES[
        :1
    ]  # where nothing can go, choosing ranks says so
    while True:
        removed = search.candidate(sizes, _prober(run, curves, bars))
        report = _make(run, choose_ranks(settings, curves, 1.0 - removed), bars)
        if search.target.met(report["quality"]):
            search.record(removed, report["quality"], stored=True)
            return {**report, "target": search.to_json()}
        # before the failure is known, so that a rerun never takes these layers for the next size's
        run.start_over()
        search.record(removed, report["quality"], stored=True)


def _prober(run: Run, curves: list[Curve], bars: ProgressBars) -> Callable[[float], dict[str, float]]:
    """The function that judges a size. The dense model runs at its first call, as a resumed run may need
    none.
    """
    base = run.plan.base
    judge = functools.cache(lambda: Judge(LayerStream(base, device=run.device), run.plan.judge))

    def measure(removed: float) -> dict[str, float]:
        chosen = choose_ranks(run.plan.settings, curves, 1.0 - removed)
        with bars.stage(f"probe, {removed:.1%} removed", len(chosen)) as tick:
            return judge().compare(TruncatedStream(base, run.analysis, chosen, run.device), tick).to_json()

    return measure


def _be_faster(run: Run, curves: list[Curve], factor: float, bars: ProgressBars) -> dict[str, Any]:
    """Least loss within 1 / factor of the dense MLPs' simulated decode time; what it comes to is in the
    report as `decode`.
    """
    shape, settings = run.plan.shape, run.plan.settings
    with bars.stage("simulated prices", 2 * len(priced_ranks(shape))) as tick:
        prices = rank_prices(shape, settings.form, tick)
    report = _make(run, _ranks_for(run, priced(curves, prices), 1.0 / factor, bars), bars)
    made = [
        {name: ProjectionSpec(**spec) for name, spec in layer.items()} for layer in report["block"]["layers"]
    ]
    dense_us = model_us(shape, [dict.fromkeys(PROJECTIONS, DENSE)] * shape.num_layers)
    simulated_us = model_us(shape, made)
    decode = {
        "asked": factor,
        "dense_simulated_us": dense_us,
        "simulated_us": simulated_us,
        "simulated_speedup": dense_us / simulated_us,
    }
    return {**report, "decode": decode}


def _created_by() -> str:
    from neuronmlp_plugin import __version__

    return f"neuronmlp {__version__}"


def _specs(record: dict[str, Any]) -> Layer:
    return {name: ProjectionSpec(**record["specs"][name]) for name in PROJECTIONS}


def _build_layers(run: Run, chosen: list[Layer], bars: ProgressBars) -> list[dict[str, Any]]:
    """Write each layer's tensors and return one record a layer; both are skipped where an earlier run left
    them.
    """
    records, dtype = [], _dtype(run.plan)
    with bars.stage("pivots and writing", len(chosen)) as tick:
        for index, specs in enumerate(chosen):
            path = run.work.path / f"built-{index:05d}.json"
            if not path.is_file():
                built = build_layer(run.plan, run.analysis, index, specs, dtype)
                _write_layer(run, index, built)
                save_json(path, _record(run, index, built))
            records.append(json.loads(path.read_text(encoding="utf-8")))
            tick(1)
    return records


def _dtype(plan: Plan) -> torch.dtype:
    chosen = plan.settings.dtype
    return (
        DTYPES[chosen] if chosen != "auto" else plan.base.tensor("model.layers.0.mlp.gate_proj.weight").dtype
    )


def _write_layer(run: Run, index: int, built: BuiltLayer) -> None:
    factors = {f"{layer_prefix(index)}mlp.{name}": tensor for name, tensor in built.tensors.items()}
    if run.plan.settings.factors_only:
        run.work.save(f"factors-{index:05d}", factors)
    else:
        write_layer(run.result, run.plan.base, index, factors)


def _record(run: Run, index: int, built: BuiltLayer) -> dict[str, Any]:
    return {
        "specs": {name: spec.to_json() for name, spec in built.specs.items()},
        "notes": built.notes,
        "matrices": [
            dataclasses.asdict(error) for error in matrix_errors(run.plan, run.analysis, index, built)
        ],
    }


def _write_whole(run: Run, block: FormatBlock) -> None:
    if not run.plan.settings.factors_only:
        write_rest(run.result, run.plan.base, block)
        return
    names = block.expected_tensors(only_changed=True)
    tensors: dict[str, torch.Tensor] = {}
    for index in range(len(block.layers)):
        tensors |= {name: t for name, t in run.work.load(f"factors-{index:05d}").items() if name in names}
    write_factor_file(run.result / FACTOR_FILE.name, block, tensors)
    copy_tokenizer_beside_factors(run.plan.base.folder, run.result)


def _judge(run: Run, bars: ProgressBars) -> tuple[dict[str, float] | None, dict[str, Any] | None]:
    """Quality of what will be served against the dense model, on text that was not calibrated on, and sample
    texts of both.
    """
    judge, base = run.plan.judge, run.plan.base.folder
    if not len(judge):
        return None, None
    overlay = run.result / FACTOR_FILE.name if run.plan.settings.factors_only else None
    folders = (open_folder(base), open_folder(run.result if overlay is None else base, overlay))
    dense, candidate = (LayerStream(*folder, device=run.device) for folder in folders)
    with bars.stage("quality", 2 * dense.num_layers) as tick:
        quality = compare(dense, candidate, judge, tick).to_json()
    return quality, _samples(run, dense, candidate, bars)


def _samples(
    run: Run, dense: LayerStream, candidate: LayerStream, bars: ProgressBars
) -> dict[str, Any] | None:
    count = run.plan.settings.samples
    if not count:
        return None
    tokenizer = load_tokenizer(run.plan.base.folder)
    with bars.stage("sample texts", 2 * count) as tick:
        return sample_texts(dense, candidate, tokenizer, count, tick)
