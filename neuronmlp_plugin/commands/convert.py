"""`neuronmlp convert`: published factors into a checkpoint that serves."""

from __future__ import annotations

import argparse
import pathlib
import shutil


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=pathlib.Path, help="folder with model.layers.N.mlp.{gate,up,down}_{v,u}_proj.weight in safetensors")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write; must not exist yet")


def run(args: argparse.Namespace) -> int:
    from neuronmlp_plugin.checkpoint.published import convert_published
    from neuronmlp_plugin.errors import OutputError

    if args.out.exists():
        raise OutputError(f"{args.out}: expected a path that does not exist yet, found one; choose another --out or remove it.")
    partial = args.out.parent / f"{args.out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        block = convert_published(args.model, partial)
        partial.rename(args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{args.out}: {block.removed_ratio:.2%} of the MLP parameters removed")
    return 0
