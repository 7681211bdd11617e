"""`neuronmlp compress`: options onto one frozen Settings, the plan printed, then the run."""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING, Any

from neuronmlp_plugin.argument_types import path
from neuronmlp_plugin.compressor.settings import (
    ALLOCATIONS,
    CHANNELS,
    DTYPES,
    FORMS,
    METHODS,
    Settings,
    default_allocation,
    default_form,
    per_cent_hint,
)
from neuronmlp_plugin.errors import UsageError, printable

if TYPE_CHECKING:
    from neuronmlp_plugin.calibration.quality import Quality
    from neuronmlp_plugin.reporting.run_report import Report

_DEFAULTS = {field: Settings.__dataclass_fields__[field].default for field in Settings.__dataclass_fields__}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=path,
        help="Hugging Face folder, or a model's id on the hub (Llama, Qwen2, Qwen3 or Mistral)",
    )
    parser.add_argument("--revision", help="branch, tag or commit, where MODEL is an id on the hub")
    parser.add_argument(
        "--out",
        type=path,
        help="folder to write; must not exist yet (required, unless --factors-only)",
    )
    _add_size(parser)
    parser.add_argument(
        "--text",
        type=path,
        help=(
            "calibration text (required): .txt, .jsonl (`text` or `messages` a line), .csv, .parquet or a "
            "saved dataset; what the MLPs see on it decides what is taken away"
        ),
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--quiet", action="store_true", help="no plan, no progress bars")
    _add_method(parser)
    _add_calibration(parser)
    parser.add_argument(
        "--analysis",
        type=path,
        help="keep the statistics in this folder, and use them again for another size or form",
    )
    parser.add_argument(
        "--factors-only",
        action="store_true",
        help="write neuronmlp/factors.safetensors beside the dense weights instead of a folder",
    )


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("calibration")
    text.add_argument(
        "--tokens",
        type=int,
        default=_DEFAULTS["tokens"],
        help="tokens for the input statistics (default %(default)s)",
    )
    text.add_argument(
        "--metric-tokens",
        type=int,
        default=_DEFAULTS["metric_tokens"],
        help="of which also go through the backward pass, for what each output is worth (default "
        "%(default)s)",
    )
    text.add_argument(
        "--judge-tokens",
        type=int,
        default=_DEFAULTS["judge_tokens"],
        help="kept apart to report quality (default %(default)s)",
    )
    text.add_argument(
        "--samples",
        type=int,
        default=_DEFAULTS["samples"],
        metavar="N",
        help="new tokens of each of the report's four sample texts, by both models (default %(default)s; 0: "
        "none, which saves minutes on a "
        "model of billions of parameters)",
    )
    text.add_argument(
        "--window", type=int, default=_DEFAULTS["window"], help="tokens per window (default %(default)s)"
    )
    text.add_argument(
        "--seed",
        type=int,
        default=_DEFAULTS["seed"],
        help="which windows are drawn where there are more than needed",
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--remove",
        type=_number,
        metavar="SHARE",
        help="share of the MLP parameters to take away, between 0 and 1 (0.20: a fifth; 0.02: 2 %%)",
    )
    size.add_argument("--keep", type=_number, metavar="SHARE", help="the same, as the share that stays")
    size.add_argument(
        "--target",
        metavar="QUALITY",
        help='as much as keeps this quality on the judged text: "ppl+2%%", "kl<0.05" or "top1>95%%"; '
        "--judge-tokens decide how fine a target can be told apart: a few per cent of perplexity with "
        "8192, less with more",
    )
    size.add_argument(
        "--faster",
        type=float,
        metavar="FACTOR",
        help="take away only as much as it needs until the MLPs decode a token FACTOR times as fast as dense "
        "ones on a core of trn1 (1.15: 15 %% faster); the time of each rank is simulated by our cost model, "
        "nothing runs on a chip",
    )


def _add_method(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("method")
    method.add_argument(
        "--form",
        choices=FORMS,
        help="compact (default): a matrix of rank R in as few numbers as it has, so that every rank saves "
        "bytes; uv: the paper's two factors, which save bytes at low ranks only; narrow: fewer channels, no "
        "factors, and with --allocation uniform an ordinary folder that any engine loads",
    )
    method.add_argument(
        "--groups",
        type=_groups,
        metavar="auto|N",
        default=None,
        help="factorise N groups of channels apart: tensor parallel sizes that divide N communicate no more "
        "than a dense model (default auto: what makes the slices nearest to square; 1 for the baselines)",
    )
    method.add_argument(
        "--tp",
        type=int,
        metavar="N",
        default=_DEFAULTS["tp"],
        help="choose a number of groups that serves N tensor-parallel ranks at full speed: a multiple of N",
    )
    method.add_argument(
        "--channels",
        choices=CHANNELS,
        default=_DEFAULTS["channels"],
        help="remove (default): layers may lose channels beside having factors; keep: factors only",
    )
    _add_ranks(method)


def _add_ranks(method: Any) -> None:
    method.add_argument(
        "--method",
        choices=METHODS,
        default=_DEFAULTS["method"],
        help=(
            "two-sided (default): an error counts by what goes into a matrix and by what its output is worth "
            "to the model; or a baseline: whitened (SVD-LLM), plain (SVD), modegpt (its MLP step: channels "
            "by leverage)"
        ),
    )
    method.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        help="how the removal is shared out. measured (default): choose ranks by predicted losses, run the "
        "model so compressed once to measure what each layer is worth there, and choose again; global: the "
        "first choice alone, minutes less and somewhat worse (what --target uses); uniform: the same share "
        "of every matrix (what the baselines use)",
    )
    method.add_argument(
        "--rank-multiple",
        type=int,
        default=_DEFAULTS["rank_multiple"],
        help="ranks are multiples of this (default %(default)s; the paper: 128)",
    )
    method.add_argument(
        "--dtype", choices=DTYPES, default=_DEFAULTS["dtype"], help="of the factors (default: the model's)"
    )


def _number(text: str) -> float:
    """A share as a number; what stands before a per cent sign is told how to write it."""
    try:
        return float(text)
    except ValueError:
        hint = "; write 0.20 for 20 %" if text.rstrip().endswith("%") else ""
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}{hint}") from None


def _groups(text: str) -> int | None:
    if text != "auto" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected auto or a number, found {text!r}.")
    return None if text == "auto" else int(text)


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises UsageError for combinations that cannot work."""
    if args.out is None and not args.factors_only:
        raise UsageError(
            "--out: expected a folder to write, found none; name one, or use --factors-only to write beside "
            "the model."
        )
    known = {name: getattr(args, name) for name in Settings.__dataclass_fields__ if hasattr(args, name)}
    known["out"] = args.out if args.out is not None else args.model
    if args.keep is not None and not 0.0 < args.keep < 1.0:
        raise UsageError(
            f"--keep: expected a share between 0 and 1 (0.80 takes a fifth away), found {args.keep:g}"
            f"{per_cent_hint(args.keep)}."
        )
    known["remove"] = args.remove if args.keep is None else 1.0 - args.keep
    known["form"] = args.form or default_form(args.method)
    known["allocation"] = args.allocation or default_allocation(args.method, args.target)
    return Settings(**known)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from neuronmlp_plugin.calibration.workers import Workers
    from neuronmlp_plugin.compressor.job import ProgressBars
    from neuronmlp_plugin.compressor.pipeline import compress
    from neuronmlp_plugin.compressor.plan import make_plan

    console = Console(quiet=args.quiet or not Workers().is_first, highlight=False)
    plan = make_plan(settings_of(args))
    print_rows(console, plan.rows())
    if args.dry_run:
        return 0
    report = compress(plan, ProgressBars(console, quiet=args.quiet))
    if report is not None:
        print_rows(console, summary_rows(report, plan.target))
    return 0


def print_rows(console: Any, rows: list[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for label, value in rows:  # Text, since a path may hold what rich would take for its own markup
        table.add_row(Text(label, style="bold"), Text(printable(value)))
    console.print(table)


def channels_row(report: Report) -> str:
    """How many channels layers keep, and which tensor-parallel sizes are at full speed."""
    kept = [row["channels"] for row in report.matrices]
    sizes = ", ".join(map(str, report.full_speed_tensor_parallel))
    span = f"{min(kept)} to {max(kept)}" if min(kept) < max(kept) else f"{kept[0]}"
    return f"{span} a layer; full speed at tensor parallel size {sizes}"


def bytes_row(report: Report) -> str:
    assert report.weight_bytes is not None and report.bytes_ratio is not None  # a compression has both
    return f"{report.weight_bytes / 1e6:.1f} MB in bf16, {report.bytes_ratio:.1%} of the dense MLPs"


def forms_row(report: Report) -> str:
    """How many matrices are stored in each form."""
    forms = [row["form"] for row in report.matrices]
    known = dict.fromkeys(("dense", *FORMS))
    return ", ".join(f"{forms.count(form)} {form}" for form in known if form in forms)


def quality_rows(quality: Quality | None) -> list[tuple[str, str]]:
    """What the judged text says; no rows where none was kept."""
    if quality is None:
        return []
    ratio, kl, top1 = map(quality.written, ("perplexity_ratio", "kl_divergence", "top1_agreement"))
    return [
        ("perplexity", f"{quality.perplexities} ({ratio})"),
        ("agreement", f"{top1} of the top tokens; KL {kl} nats a token"),
    ]


def summary_rows(report: Report, target: pathlib.Path) -> list[tuple[str, str]]:
    """What was reached, in a few lines."""
    rows = [
        ("removed", f"{report.removed_ratio:.2%} of the MLP parameters"),
        ("channels", channels_row(report)),
        ("bytes", bytes_row(report)),
        ("forms", forms_row(report)),
        *quality_rows(report.quality),
    ]
    if report.target is not None:
        asked = report.target
        rows.append(("target", f"{asked['asked']}: met as stored, after {len(asked['probes'])} probes"))
    if report.decode is not None:
        line = (
            "MLPs {dense_simulated_us:.0f} us dense, {simulated_us:.0f} us now, x {simulated_speedup:.3f}; "
            "simulated, one token, trn1"
        )
        rows.append(("decode", line.format(**report.decode)))
    rows += [("note", note) for note in report.notes]
    return [*rows, ("written", f"{target}; open neuronmlp_report.html there in a browser")]
