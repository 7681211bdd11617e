"""Carry a plan out: analyse, choose ranks, build, write, judge, report. What is finished is never done
again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch

from neuronmlp_plugin.calibration.layer_stream import LayerStream
from neuronmlp_plugin.calibration.quality import Judge, Quality
from neuronmlp_plugin.calibration.text import load_tokenizer
from neuronmlp_plugin.calibration.workers import Workers
from neuronmlp_plugin.checkpoint.digests import file_digest
from neuronmlp_plugin.checkpoint.loader import open_folder
from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE
from neuronmlp_plugin.checkpoint.schema import FormatBlock, parse_block
from neuronmlp_plugin.checkpoint.writer import (
    alone_in,
    copy_tokenizer_beside_factors,
    layer_file,
    layer_prefix,
    move_whole,
    write_factor_file,
    write_layer,
    write_record,
    write_rest,
)
from neuronmlp_plugin.compressor.analyse import JUDGED, analyse
from neuronmlp_plugin.compressor.build import BuiltLayer, build_layer, layer_of, matrix_errors, untouched
from neuronmlp_plugin.compressor.decode_time import dense_us, level_prices, model_us, priced_launches
from neuronmlp_plugin.compressor.exhibits import loss_by_size, sample_texts, spectra
from neuronmlp_plugin.compressor.job import ProgressBars, Workspace, refuse_anothers
from neuronmlp_plugin.compressor.marginal import TruncatedStream, measured_gains, scaled
from neuronmlp_plugin.compressor.offers import (
    FactoredLayer,
    factor_layer,
    make_offers,
    priced,
    read_layers,
    read_mlp,
    read_offer,
)
from neuronmlp_plugin.compressor.origin import digest
from neuronmlp_plugin.compressor.plan import Plan, describe
from neuronmlp_plugin.compressor.settings import parse_target
from neuronmlp_plugin.compressor.target import SIZES, Search
from neuronmlp_plugin.lowrank.allocate import CHOOSERS, Choice, Layer, most_removable
from neuronmlp_plugin.models.factors import PROJECTIONS, MLPLayer, ProjectionSpec
from neuronmlp_plugin.reporting.folder import base_facts, write_report
from neuronmlp_plugin.reporting.run_report import Report

MEASURED_TURNS = 1  # how often gains are measured and layers chosen anew: docs/compression_experiments.md
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

    def factored(self, index: int, choice: Choice) -> FactoredLayer | None:
        """The layer that a choice stands for; None where it is the base's own. The last choice of each layer
        is kept as a file.
        """
        if choice.kept == self.plan.shape.intermediate_size and not any(choice.ranks):
            return None
        kind = f"factored-{index:05d}"
        name = f"{kind}-{digest(dataclasses.asdict(choice))}"
        if not self.work.has(name):
            mlp, offer = (
                read_mlp(self.plan, self.analysis, index, self.device),
                read_offer(self.plan, self.analysis, index),
            )
            # One choice of a layer at a time: the probes of a target would fill the disk.
            for path in self.work.path.glob(f"{kind}-*"):
                path.unlink()
            self.work.save(name, factor_layer(mlp, offer, choice, self.plan.groups).to_tensors())
        return FactoredLayer.of(self.work.load(name))

    def factor(self, choices: Sequence[Choice], bars: ProgressBars) -> TruncatedStream:
        """All layers at once, with a bar; the model of them."""
        with bars.stage("factors", len(choices)) as tick:
            for index, choice in enumerate(choices):
                self.factored(index, choice)
                tick(1)
        return TruncatedStream(
            self.plan.base, lambda index: self.factored(index, choices[index]), self.device
        )

    def judge(self, dense: LayerStream) -> Judge:
        """Of candidates, by what the analysis has seen of the dense model."""
        return Judge(dense, self.plan.judge, exact=self.analysis.load(JUDGED)["hidden"])

    def finish(self) -> None:
        self.plan.target.parent.mkdir(parents=True, exist_ok=True)
        move_whole(self.result, self.plan.target)
        shutil.rmtree(self.plan.work)


def compress(plan: Plan, bars: ProgressBars) -> Report | None:
    """Compress as planned into `plan.target`, which appears whole or not at all; returns the report.

    An interrupted run goes on from its last finished layer, to an identical result. Of several processes
    (`Workers`) all take part in the analysis; the first does the rest, and the others return None.
    """
    workers = Workers()
    # The first makes the folders, and the others find them.
    with workers.first_ahead():
        run = Run(plan, workers.device)
    workers.wait()
    shown = bars if workers.is_first else ProgressBars(bars.console, quiet=True)
    with alone_in(run.work.path) if workers.is_first else contextlib.nullcontext():
        # Once an analysis is whole, runs of other sizes may read it side by side.
        with alone_in(run.analysis.path) if workers.is_first else contextlib.nullcontext():
            analyse(plan, run.analysis, shown, workers)
            workers.wait()
            make_offers(plan, run.analysis, shown, workers)
        workers.wait()  # the first removes the folder that the others look into
        return _finish(run, bars) if workers.is_first else None


def _finish(run: Run, bars: ProgressBars) -> Report:
    layers, settings = read_layers(run.plan, run.analysis), run.plan.settings
    if settings.target is not None:
        report = _meet_target(run, layers, settings.target, bars)
    elif settings.faster is not None:
        report = _be_faster(run, layers, settings.faster, bars)
    else:
        assert settings.remove is not None
        report = _make(run, _choices_for(run, layers, 1.0 - settings.remove, bars), bars)
    report = dataclasses.replace(
        report,
        loss_by_size=loss_by_size(layers, settings),
        spectra=spectra(layers) if run.plan.factored_levels else None,
        base=base_facts(run.plan.base.folder),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
    )
    write_report(run.result, report)
    run.finish()
    return report


def _choose(run: Run, layers: Sequence[Layer], keep: float) -> list[Choice]:
    settings = run.plan.settings
    return CHOOSERS[settings.allocation](layers, keep, settings.form, settings.rank_multiple)


def _choices_for(run: Run, layers: list[Layer], keep: float, bars: ProgressBars) -> list[Choice]:
    """What the layers become; with `measured`, chosen again under what the last choice turned out to be
    worth.
    """
    choices = _choose(run, layers, keep)
    for turn in range(MEASURED_TURNS if run.plan.settings.allocation == "measured" else 0):
        measured = run.work.once(f"gains-{turn}", functools.partial(_measured, run, choices, bars))
        choices = _choose(run, scaled(layers, choices, measured["gains"]), keep)
    return choices


def _measured(run: Run, choices: list[Choice], bars: ProgressBars) -> dict[str, Any]:
    truncated = run.factor(choices, bars)
    return {"gains": measured_gains(truncated, run.plan.measured, run.work, bars)}


def _make(run: Run, choices: list[Choice], bars: ProgressBars) -> Report:
    """Build, write and judge what `choices` say; the report of it."""
    records = _build_layers(run, choices, bars)
    layers = tuple(_stored_layer(run.plan, record) for record in records)
    block = FormatBlock(layers, run.plan.shape, describe(run.plan), _created_by())
    _write_whole(run, block)
    quality, samples = _judge(run, bars)
    return Report(
        block=block.to_json(),
        weight_bytes=block.weight_bytes,
        full_speed_tensor_parallel=block.full_speed_sizes,
        ordinary=block.ordinary_size is not None,
        bytes_ratio=block.bytes_ratio,
        matrices=[row for record in records for row in record["matrices"]],
        notes=[note for record in records for note in record["notes"]],
        quality=quality,
        samples=samples,
    )


def _meet_target(run: Run, layers: list[Layer], asked: str, bars: ProgressBars) -> Report:
    """The largest removal that meets the target both truncated and as stored; its report, with all probes as
    `target`.
    """
    search = Search(run.plan.work / "target.json", asked, parse_target(asked))
    settings = run.plan.settings
    most = most_removable(layers, settings.form, settings.rank_multiple)
    # Where nothing can go, choosing ranks says so.
    sizes = [size for size in SIZES if size <= most] or SIZES[:1]
    while True:
        removed = search.candidate(sizes, _prober(run, layers, bars))
        report = _make(run, _choose(run, layers, 1.0 - removed), bars)
        assert report.quality is not None  # a target is refused without a text to judge on
        quality = report.quality.to_json()
        if search.target.met(quality):
            search.record(removed, quality, stored=True)
            return dataclasses.replace(report, target=search.to_json())
        # before the failure is known, so that a rerun never takes these layers for the next size's
        run.start_over()
        search.record(removed, quality, stored=True)


def _prober(run: Run, layers: list[Layer], bars: ProgressBars) -> Callable[[float], dict[str, float]]:
    """The function that judges a size."""
    judge = functools.cache(lambda: run.judge(LayerStream(run.plan.base, device=run.device)))

    def measure(removed: float) -> dict[str, float]:
        truncated = run.factor(_choose(run, layers, 1.0 - removed), bars)
        with bars.stage(f"probe, {removed:.1%} removed", truncated.num_layers) as tick:
            return judge().compare(truncated, tick).to_json()

    return measure


def _be_faster(run: Run, layers: list[Layer], factor: float, bars: ProgressBars) -> Report:
    """Least loss within 1 / factor of the dense MLPs' simulated decode time; what it comes to is in the
    report as `decode`.
    """
    plan = run.plan
    with bars.stage("simulated prices", priced_launches(plan)) as tick:
        prices = level_prices(plan, tick)
    report = _make(run, _choices_for(run, priced(layers, prices), 1.0 / factor, bars), bars)
    # As stored, which may differ from what was chosen: weak pivots become uv (`build._store`).
    made = parse_block(report.block, plan.base.config, str(plan.base.folder)).layers
    before, simulated_us = dense_us(plan), model_us(made)
    decode = {
        "asked": factor,
        "dense_simulated_us": before,
        "simulated_us": simulated_us,
        "simulated_speedup": before / simulated_us,
    }
    return dataclasses.replace(report, decode=decode)


def _created_by() -> str:
    from neuronmlp_plugin import __version__

    return f"neuronmlp {__version__}"


def _stored_layer(plan: Plan, record: dict[str, Any]) -> MLPLayer:
    specs = {name: ProjectionSpec(**record["specs"][name]) for name in PROJECTIONS}
    return MLPLayer.of(plan.shape, specs, channels=record["channels"], groups=plan.groups)


def _build_layers(run: Run, choices: list[Choice], bars: ProgressBars) -> list[dict[str, Any]]:
    """Write each layer's tensors and return one record a layer; both are skipped where an earlier run left
    them.
    """
    records = []
    with bars.stage("factors and writing", len(choices)) as tick:
        for index, choice in enumerate(choices):
            make = functools.partial(_built, run, index, choice)
            stands = functools.partial(_is_written, run, index)
            records.append(run.work.once(f"built-{index:05d}", make, stands))
            tick(1)
    return records


def _is_written(run: Run, index: int, record: dict[str, Any]) -> bool:
    return bool(record["file"] == _layer_digest(run, index))


def _layer_digest(run: Run, index: int) -> str | None:
    """Of the file that `_write_layer` has written; None where there is none."""
    path = layer_file(run.result, index, run.plan.shape.num_layers)
    return file_digest(path) if path.is_file() else None


def _built(run: Run, index: int, choice: Choice) -> dict[str, Any]:
    """Write one layer; its record."""
    factored = run.factored(index, choice)
    if factored is None:
        built = untouched(run.plan, index)
    else:
        built = build_layer(run.plan, index, factored, layer_of(run.plan, choice), _dtype(run.plan))
    _write_layer(run, index, built)
    errors = matrix_errors(run.plan, run.analysis, index, built, factored)
    return {
        "file": _layer_digest(run, index),
        "specs": {name: spec.to_json() for name, spec in built.layer.items()},
        "channels": built.layer.channels,
        "notes": built.notes,
        "matrices": [dataclasses.asdict(error) for error in errors],
    }


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
    write_record(run.result)


def _judge(run: Run, bars: ProgressBars) -> tuple[Quality | None, dict[str, Any] | None]:
    """Quality of what will be served against the dense model, on text that was not calibrated on, and sample
    texts of both.
    """
    base = run.plan.base.folder
    if not len(run.plan.judge):
        return None, None
    overlay = run.result / FACTOR_FILE.name if run.plan.settings.factors_only else None
    folders = (open_folder(base), open_folder(run.result if overlay is None else base, overlay))
    dense, candidate = (LayerStream(*folder, device=run.device) for folder in folders)
    with bars.stage("quality", dense.num_layers) as tick:
        quality = run.judge(dense).compare(candidate, tick)
    return quality, _samples(run, dense, candidate, bars)


def _samples(
    run: Run, dense: LayerStream, candidate: LayerStream, bars: ProgressBars
) -> dict[str, Any] | None:
    count = run.plan.settings.samples
    if not count:
        return None
    tokenizer = load_tokenizer(run.plan.base.folder)
    with bars.stage("sample texts", 2 * count) as tick:
        room = run.plan.footprint().room_for_layers()
        return sample_texts(dense, candidate, tokenizer, count, tick, room)
