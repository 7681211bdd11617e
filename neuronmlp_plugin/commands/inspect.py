"""`neuronmlp inspect`: headers only; no weights are read, unless they are to be verified."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterator

from neuronmlp_plugin.argument_types import path
from neuronmlp_plugin.errors import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=path, help="a checkpoint folder, or a dense folder with a factor file in it"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the block as JSON")
    shown.add_argument(
        "--verify",
        action="store_true",
        help="read all files, and compare them with the digests that were recorded when they were written",
    )


def run(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE, Checkpoint, FactorFile
    from neuronmlp_plugin.errors import CheckpointError

    if args.verify:
        return _verify(args.model)
    checkpoint = Checkpoint(args.model)
    block = checkpoint.block
    if block is None and (args.model / FACTOR_FILE).is_file():
        block = FactorFile(args.model / FACTOR_FILE, checkpoint.config).block
    if block is None:
        raise CheckpointError(
            f"{args.model}: expected a neuronmlp checkpoint or a factor file, found a dense model; compress "
            "it first."
        )
    if args.json:
        sizes = {
            "weight_bytes": block.weight_bytes,
            "bytes_ratio": round(block.bytes_ratio, 6),
            "full_speed_tensor_parallel": block.full_speed_sizes,
        }
        print(json.dumps({**block.to_json(), **sizes}, indent=2))
    else:
        _print_table(block)
    return 0


def _verify(model: pathlib.Path) -> int:
    from neuronmlp_plugin.checkpoint.digests import verified
    from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE, Checkpoint

    Checkpoint(model)
    beside = (model / FACTOR_FILE).parent
    for folder, said in verified([model, *([beside] if beside.is_dir() else [])]):
        print(f"{printable(str(folder))}: {said}")
    return 0


def _print_table(block) -> None:  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from neuronmlp_plugin.checkpoint.schema import base_layers
    from neuronmlp_plugin.models.factors import PROJECTIONS

    dense = base_layers(block.shape)[0].weight_bytes
    groups = f", {block.groups} groups" if block.groups > 1 else ""
    title = f"{block.removed_ratio:.2%} of the MLP parameters removed{groups} ({printable(block.created_by)})"
    table = Table(title=Text(title))
    for column in ("layer", "channels", *PROJECTIONS, "bytes"):
        table.add_column(column, justify="right")
    for index, layer in enumerate(block.layers):
        cells = (_cell(layer[name]) for name in PROJECTIONS)
        table.add_row(str(index), str(layer.channels), *cells, f"{layer.weight_bytes / dense:.1%}")
    Console().print(table)
    for line in _caption(block):
        print(line)


def _caption(block) -> Iterator[str]:  # type: ignore[no-untyped-def]
    """What the table shows, in which units, and its sums."""
    ranks = " (of each group)" if block.groups > 1 else ""
    yield "A row is a layer. channels: numbers between gate, up and down that stay."
    yield f"gate, up, down: form and rank{ranks} of a matrix; dense has no rank; int8 is one byte a number."
    yield "bytes: of the layer's MLP over a dense one in bf16 (floating point is counted as bf16)."
    yield f"All layers: {block.weight_bytes / 1e6:.1f} MB, {block.bytes_ratio:.1%} of the dense MLPs."
    yield f"Full speed at tensor-parallel sizes {', '.join(map(str, block.full_speed_sizes))}."


def _cell(spec) -> str:  # type: ignore[no-untyped-def]
    return " ".join(str(value) for value in spec.to_json().values())
