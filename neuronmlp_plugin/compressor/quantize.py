"""A folder whose MLPs are int8, made from one whose MLPs are not, a layer at a time."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from neuronmlp_plugin import __version__
from neuronmlp_plugin.calibration.quality import Judge
from neuronmlp_plugin.calibration.stream import LayerStream
from neuronmlp_plugin.checkpoint.reader import Checkpoint, dense_block
from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.checkpoint.writer import layer_prefix, whole_folder, write_layer, write_rest
from neuronmlp_plugin.compressor.progress import ProgressBars
from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.lowrank.rounding import grams, refit, round_under
from neuronmlp_plugin.models.definition import LIMIT, quantize, scales_of
from neuronmlp_plugin.models.factors import INT8, SCALE, MLPLayer, ProjectionSpec
from neuronmlp_plugin.reporting.folder import REPORT_FILE, read_report, write_report

Rounded = tuple[torch.Tensor, torch.Tensor]  # q and its scales


def quantize_folder(
    model: pathlib.Path,
    out: pathlib.Path,
    bars: ProgressBars,
    judge: Callable[[], Judge] | None = None,
    text: pathlib.Path | None = None,
) -> FormatBlock:
    """Write `out`, which appears whole or not at all, with every MLP matrix of `model` in int8 and all else
    as it was.

    Where `model` has a report, `out` gets one of its own, whose quality is what `judge` measures (on `text`,
    which is only named), or none. Raises OutputError where `out` exists or the disk is full, CheckpointError
    where `model` is int8 already, and the reader's errors.
    """
    base = Checkpoint(model)
    before = base.block or dense_block(base)
    if before.has_int8:
        raise CheckpointError(
            f"{model}: expected MLPs in floating point, found int8; quantise the folder that it was made from."
        )
    layers = tuple(
        layer.with_specs({name: dataclasses.replace(spec, dtype=INT8) for name, spec in layer.items()})
        for layer in before.layers
    )
    provenance = {**before.provenance, "quantized_from": str(model)}
    after = FormatBlock(layers, before.shape, provenance, f"neuronmlp {__version__}")
    with whole_folder(out) as folder:
        with bars.stage("int8", len(layers)) as tick:
            for index, layer in enumerate(layers):
                write_layer(folder, base, index, _int8_layer(base, f"{layer_prefix(index)}mlp.", layer))
                tick(1)
        write_rest(folder, base, after)
        if (model / REPORT_FILE).is_file():
            write_report(
                folder,
                {**_report(read_report(model), folder, after, judge, bars), "judged_on": text and text.name},
            )
    return after


def _report(
    before: dict[str, Any],
    folder: pathlib.Path,
    block: FormatBlock,
    judge: Callable[[], Judge] | None,
    bars: ProgressBars,
) -> dict[str, Any]:
    """The source's report with what rounding changed, and without what it may have changed and nobody
    measured.
    """
    quality = None
    if judge is not None:
        made = judge()  # runs the dense model: only here, where its numbers have a place
        with bars.stage("quality", len(block.layers)) as tick:
            quality = made.compare(LayerStream(Checkpoint(folder)), tick).to_json()
    note = "Rounded to int8 afterwards: the errors of single matrices are those before it."
    sizes = {"weight_bytes": block.weight_bytes, "bytes_ratio": block.bytes_ratio}
    return {
        **before,
        **sizes,
        "block": block.to_json(),
        "quality": quality,
        "samples": None,
        "notes": [*before.get("notes", []), note],
    }


def _int8_layer(base: Checkpoint, prefix: str, layer: MLPLayer) -> dict[str, torch.Tensor]:
    """Full name -> weights and scales of one layer."""
    tensors = {}
    for projection, matrix in layer.matrices.items():
        spec = matrix.spec
        names = [f"{prefix}{projection}.{suffix}" for suffix in matrix.tensor_shapes()]
        weights = [base.tensor(name) for name in names]
        rounded = (
            [quantize(weights[0])]
            if not spec.is_low_rank
            else quantize_pair(projection, spec, weights[0], weights[1])
        )
        for name, (q, scale) in zip(names, rounded, strict=True):
            tensors[name], tensors[name + SCALE] = q, scale
    return tensors


def quantize_pair(
    projection: str, spec: ProjectionSpec, first: torch.Tensor, second: torch.Tensor
) -> list[Rounded]:
    """The two factors of a low-rank matrix, in the order of `tensor_shapes`, rounded for the sake of their
    product.

    The first under what the second makes of its errors, then the second, fitted anew to what the first has
    become.
    """
    first, second = first.float(), second.float()
    compact, down = spec.form == "compact", projection == "down_proj"
    scale = scales_of(first)
    weighed = grams(second.T, second.T, compact and not down)[
        0
    ]  # gate and up pass z on beside c's products: [I, c^T]
    q = round_under(first.T, scale, weighed, LIMIT).T.contiguous()
    gram, cross = grams(first, q * scale[:, None], compact and down)
    fitted = refit(second, cross, gram)
    scale_fitted = scales_of(fitted)
    q_fitted = round_under(fitted, scale_fitted[:, None], gram, LIMIT)
    return [(q.to(torch.int8), scale), (q_fitted.to(torch.int8), scale_fitted)]
