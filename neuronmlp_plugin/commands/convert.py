"""`neuronmlp convert`: published factors into a checkpoint that serves."""

from __future__ import annotations

import argparse

from neuronmlp_plugin.argument_types import path
from neuronmlp_plugin.errors import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=path,
        help="folder with model.layers.N.mlp.{gate,up,down}_{v,u}_proj.weight in safetensors",
    )
    parser.add_argument(
        "--out", type=path, required=True, help="folder to write; must not exist yet (required)"
    )


def run(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.checkpoint.conversion import convert_published
    from neuronmlp_plugin.checkpoint.writer import whole_folder

    with whole_folder(args.out) as folder:
        block = convert_published(args.model, folder)
    print(f"{printable(str(args.out))}: {block.removed_ratio:.2%} of the MLP parameters removed")
    return 0
