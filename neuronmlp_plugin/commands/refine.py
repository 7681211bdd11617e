"""`neuronmlp refine`: options onto one frozen RefineSettings, the plan printed, then the run."""

from __future__ import annotations

import argparse
from typing import Any

from neuronmlp_plugin.argument_types import path
from neuronmlp_plugin.refinement.refine_settings import ARITHMETIC, LOSSES, STAGES, STORAGES, RefineSettings

_DEFAULTS: dict[str, Any] = {
    name: field.default for name, field in RefineSettings.__dataclass_fields__.items()
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path, help="folder that `compress` wrote")
    parser.add_argument(
        "--dense", type=path, required=True, help="the dense folder it was made from (required)"
    )
    parser.add_argument(
        "--text",
        type=path,
        required=True,
        help="the calibration text (required); its end judges and is not trained on",
    )
    parser.add_argument(
        "--out", type=path, required=True, help="folder to write; must not exist yet (required)"
    )
    _add_training(parser)
    _add_steps(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--quiet", action="store_true", help="no plan, no progress bars")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stages",
        type=lambda text: tuple(text.split(",")),
        default=_DEFAULTS["stages"],
        help=(
            f"of {', '.join(STAGES)}, in order: layer by layer, then the whole model (default "
            f"{','.join(_DEFAULTS['stages'])})"
        ),
    )
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        default=_DEFAULTS["loss"],
        help=(
            "of distill: KL to the dense model with a share of the text's next token (default), without, or "
            "that token alone"
        ),
    )
    parser.add_argument(
        "--adapter-rank",
        type=int,
        default=0,
        help="train a LoRA of this rank on every weight and merge it (default 0: the weights)",
    )
    parser.add_argument(
        "--learning-rate", type=float, help="of Adam (default: by how far the model is from the dense one)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=_DEFAULTS["tokens"],
        help="to train on; a shorter text is gone through again (default %(default)s)",
    )


def _add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window",
        type=int,
        default=_DEFAULTS["window"],
        help="tokens per training window (default %(default)s)",
    )
    parser.add_argument(
        "--batch", type=int, default=_DEFAULTS["batch"], help="windows a step (default %(default)s)"
    )
    parser.add_argument(
        "--judge-tokens",
        type=int,
        default=_DEFAULTS["judge_tokens"],
        help="kept apart to judge (default %(default)s)",
    )
    parser.add_argument(
        "--arithmetic",
        choices=ARITHMETIC,
        default=_DEFAULTS["arithmetic"],
        help="of the products in training (default: bfloat16 where the processor has it, else float32)",
    )
    parser.add_argument(
        "--storage",
        choices=STORAGES,
        default=_DEFAULTS["storage"],
        help="of the result: as the source (default), or int8, trained through the rounding",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text, and of the adapters")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from neuronmlp_plugin.calibration.quality import Quality
    from neuronmlp_plugin.commands.compress import print_rows
    from neuronmlp_plugin.compressor.job import ProgressBars
    from neuronmlp_plugin.refinement.refiner import make_plan, refine

    console = Console(quiet=args.quiet, highlight=False)
    plan = make_plan(
        RefineSettings(**{name: getattr(args, name) for name in RefineSettings.__dataclass_fields__})
    )
    print_rows(console, plan.rows())
    if args.dry_run:
        return 0
    refinement = refine(plan, ProgressBars(console, quiet=args.quiet)).refinement
    assert refinement is not None
    rows = [(entry["stage"], str(Quality.of(entry["quality"]))) for entry in refinement["tried"]]
    print_rows(console, [*rows, ("kept", refinement["kept"]), ("written", str(args.out))])
    return 0
