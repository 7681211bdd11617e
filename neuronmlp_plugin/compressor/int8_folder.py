"""A folder whose MLPs are int8, made from one whose MLPs are not, a layer at a time."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from neuronmlp_plugin import __version__
from neuronmlp_plugin.calibration.layer_stream import LayerStream, best_device
from neuronmlp_plugin.calibration.quality import Judge
from neuronmlp_plugin.calibration.statistics import hooked, layer_moments
from neuronmlp_plugin.calibration.workers import Workers
from neuronmlp_plugin.checkpoint.hub import files_to_copy
from neuronmlp_plugin.checkpoint.loader import build_skeleton
from neuronmlp_plugin.checkpoint.reader import Checkpoint, dense_block
from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.checkpoint.writer import layer_prefix, whole_folder, write_layer, write_rest
from neuronmlp_plugin.compressor.job import ProgressBars
from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.lowrank.rounding import refit, round_under
from neuronmlp_plugin.models.definition import LIMIT, Weight, scales_of, tensors_of
from neuronmlp_plugin.models.factors import INT8, PROJECTIONS, Matrix
from neuronmlp_plugin.reporting.folder import REPORT_FILE, read_report, write_report
from neuronmlp_plugin.reporting.run_report import Report

# Calibration tokens behind the moments that rounding goes by: twenty times the channels of a small model.
MOMENT_TOKENS = 32768


def quantize_folder(
    model: pathlib.Path,
    out: pathlib.Path,
    bars: ProgressBars,
    windows: torch.Tensor | None = None,
    judge: Callable[[], Judge] | None = None,
    text: pathlib.Path | None = None,
) -> FormatBlock:
    """Write `out`, which appears whole or not at all, with every MLP matrix of `model` in int8 and all else
    as it was.

    Rounding goes by what the MLPs see on `windows [n, S]`, or by the weights alone. Where `model` has a
    report, `out` gets one of its own, whose quality is what `judge` measures (on `text`, which is only
    named), or none. Raises OutputError where `out` exists or the disk is full, CheckpointError where `model`
    is int8 already, and the reader's errors.
    """
    base = Checkpoint(model)
    before = base.block or dense_block(base)
    # Told before the work: a config that transformers builds no model of, and a file that cannot go with it.
    build_skeleton(base)
    files_to_copy(base.folder)
    if before.has_int8:
        raise CheckpointError(
            f"{model}: expected MLPs in floating point, found int8; quantise the folder that it was made "
            "from."
        )
    after = dataclasses.replace(
        int8_block(before), provenance={**before.provenance, "quantized_from": str(model)}
    )
    with whole_folder(out) as folder:
        write_int8(folder, base, after, windows, bars)
        write_rest(folder, base, after)
        if (model / REPORT_FILE).is_file():
            report = _report(read_report(model), folder, after, judge, bars)
            write_report(folder, dataclasses.replace(report, judged_on=None if text is None else text.name))
    return after


def int8_block(before: FormatBlock) -> FormatBlock:
    """The same layers, with every matrix in int8."""
    layers = tuple(
        layer.with_specs({name: dataclasses.replace(spec, dtype=INT8) for name, spec in layer.items()})
        for layer in before.layers
    )
    return FormatBlock(layers, before.shape, before.provenance, f"neuronmlp {__version__}")


def write_int8(
    folder: pathlib.Path,
    base: Checkpoint,
    block: FormatBlock,
    windows: torch.Tensor | None,
    bars: ProgressBars,
) -> None:
    """Write the layers of `base` as `block` says, which is `int8_block` of its own."""
    stream = None if windows is None else LayerStream(base, device=best_device())
    hidden = None if windows is None or stream is None else stream.embed(windows)
    with bars.stage("int8", len(block.layers)) as tick:
        for index, layer in enumerate(block.layers):
            known = dict.fromkeys(PROJECTIONS, Statistics())
            if stream is not None and hidden is not None:
                known = _layer_statistics(stream, index, hidden)
            prefix = f"{layer_prefix(index)}mlp."
            tensors: dict[str, torch.Tensor] = {}
            for projection, matrix in layer.matrices.items():
                stored = {s: base.tensor(f"{prefix}{projection}.{s}") for s in matrix.tensor_shapes()}
                rounded = round_matrix(matrix, stored, known[projection])
                tensors |= {f"{prefix}{projection}.{suffix}": tensor for suffix, tensor in rounded.items()}
            write_layer(folder, base, index, tensors)
            tick(1)


def _report(
    before: Report,
    folder: pathlib.Path,
    block: FormatBlock,
    judge: Callable[[], Judge] | None,
    bars: ProgressBars,
) -> Report:
    """The source's report with what rounding changed, and without what it may have changed and nobody
    measured.
    """
    quality = None
    if judge is not None:
        made = judge()  # runs the dense model: only here, where its numbers have a place
        with bars.stage("quality", len(block.layers)) as tick:
            quality = made.compare(LayerStream(Checkpoint(folder)), tick)
    note = "Rounded to int8 afterwards: the errors of single matrices are those before it."
    return dataclasses.replace(
        before,
        block=block.to_json(),
        weight_bytes=block.weight_bytes,
        bytes_ratio=block.bytes_ratio,
        quality=quality,
        samples=None,
        notes=[*before.notes, note],
    )


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is known of a matrix in its model: `moment` `[in, in]`, E[x x^T] of its inputs, and `worth`
    `[out]` of an error in each of its outputs. None: all alike, and nothing to do with each other.
    """

    moment: torch.Tensor | None = None
    worth: torch.Tensor | None = None


@torch.no_grad()
def _layer_statistics(stream: LayerStream, index: int, hidden: torch.Tensor) -> dict[str, Statistics]:
    """What the layer's three matrices see on `hidden [n, S, H]`, which is taken through the layer in place.

    An error e in a channel of gate puts e silu'(gate) up into the channel that down reads, one in up e
    silu(gate); and down makes of it as much as its column is long: all of which is known after one forward
    pass.
    """
    layer = stream.load(index)
    mlp: Any = layer.mlp
    squares: dict[str, torch.Tensor] = {}
    gates: list[torch.Tensor] = []

    def by_gate(_module: Any, _args: Any, gate: torch.Tensor) -> None:
        gates.append(gate)
        _add(squares, "up_proj", F.silu(gate))

    def by_up(_module: Any, _args: Any, up: torch.Tensor) -> None:
        # transformers' MLP calls gate, then up: what was seen last belongs to this batch.
        gate = gates.pop()
        sigmoid = gate.sigmoid()
        # silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
        _add(squares, "gate_proj", up * sigmoid * (1 + gate * (1 - sigmoid)))

    handles = [mlp.gate_proj.register_forward_hook(by_gate), mlp.up_proj.register_forward_hook(by_up)]
    with hooked(handles):
        moments = layer_moments(stream, layer, hidden, lambda _: None, Workers())
    down = mlp.down_proj
    # Columns of down in any form: what it makes of unit vectors. Behind the hooks, which would take these for
    # activations.
    columns = down(torch.eye(len(moments.down), device=stream.device)).square().sum(1).cpu()
    stream.release(index)
    up = {name: Statistics(moments.gate_up, squares[name].cpu() * columns) for name in squares}
    return {**up, "down_proj": Statistics(moments.down)}


def _add(squares: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> None:
    found = values.reshape(-1, values.shape[-1]).square().sum(0)
    squares[name] = squares[name] + found if name in squares else found


def round_matrix(
    matrix: Matrix, tensors: Mapping[str, torch.Tensor], known: Statistics
) -> dict[str, torch.Tensor]:
    """A matrix in int8, by suffix, from its floating-point tensors: one whose product with its inputs is near
    to what it was.

    The first factor is rounded under the moment of its inputs and under what the second makes of its errors;
    the second is fitted to what the first has become, and rounded under the moment of what it will see.
    Rounded each for itself, the factors of a compact matrix move it several times as far.
    """
    first, second = (tensors[suffix].float() if suffix else None for suffix in matrix.suffixes)
    if first is None or second is None:
        weight = second if first is None else first
        assert weight is not None
        q = _rounded(weight, known.moment, None)  # its rows have nothing to do with each other
        return tensors_of(matrix, *((None, q) if first is None else (q, None)))
    halves = _round_down if matrix.is_down else _round_up
    return tensors_of(matrix, *halves(matrix, first, second, known))


def _round_up(matrix: Matrix, first: torch.Tensor, second: torch.Tensor, known: Statistics) -> list[Weight]:
    """Gate or up: the groups share the input, and each has outputs of its own."""
    moment, groups, pivots = known.moment, matrix.groups, matrix.pivots
    worth = torch.ones(matrix.channels) if known.worth is None else known.worth.float()
    firsts, seconds = [], []
    for f, s, w in zip(first.chunk(groups), second.chunk(groups), worth.chunk(groups), strict=True):
        # What an error in z costs, [R, R]: through the outputs that the second factor makes of it and, below,
        # as itself.
        weighed = s.T @ (w[pivots:, None] * s)
        if pivots:  # they are outputs themselves
            weighed += torch.diag(w[:pivots])
        firsts.append(_rounded(f, moment, weighed))
        before, after = f.double(), firsts[-1].expanded().double()
        # With z = first x and z' = the rounded first's: E[z z'^T] and, as `gram`, E[z' z'^T].
        seen = after if moment is None else after @ moment
        gram = seen @ after.T
        seconds.append(_rounded(refit(s, before @ seen.T, gram), gram, None))
    return [_stacked(firsts), _stacked(seconds)]


def _round_down(matrix: Matrix, first: torch.Tensor, second: torch.Tensor, known: Statistics) -> list[Weight]:
    """Down: each group has inputs of its own, and all add up in the outputs."""
    size, pivots, rank = matrix.channels // matrix.groups, matrix.pivots, matrix.rank
    weighed = second.T @ second
    firsts = []
    for t, f in enumerate(first.chunk(matrix.groups)):
        inputs, own = slice(t * size + pivots, (t + 1) * size), slice(t * rank, (t + 1) * rank)
        moment = None if known.moment is None else known.moment[inputs, inputs]
        # The group's own block: factors are rounded group by group, and the fit of the second, below, sees
        # all of them.
        firsts.append(_rounded(f, moment, weighed[own, own]))
    stacked = _stacked(firsts)
    before, after = (_spread(matrix, f.double()) for f in (first, stacked.expanded()))
    seen = after if known.moment is None else after @ known.moment
    gram = seen @ after.T
    return [stacked, _rounded(refit(second, before @ seen.T, gram), gram, None)]


def _rounded(weight: torch.Tensor, inputs: torch.Tensor | None, outputs: torch.Tensor | None) -> Weight:
    scale = scales_of(weight)
    return Weight(round_under(weight, scale[:, None], LIMIT, inputs, outputs).to(torch.int8), scale)


def _spread(matrix: Matrix, first: torch.Tensor) -> torch.Tensor:
    """Down's first factor as the whole matrix `[g R, channels]` that it stands for."""
    blocks = first.chunk(matrix.groups)
    # A pivot passes into its own z as it is.
    unit = torch.eye(matrix.rank, dtype=first.dtype)[:, : matrix.pivots]
    return torch.block_diag(*(torch.cat((unit, block), 1) for block in blocks))


def _stacked(parts: list[Weight]) -> Weight:
    scales = [part.scale for part in parts if part.scale is not None]
    return Weight(torch.cat([part.values for part in parts]), torch.cat(scales))
