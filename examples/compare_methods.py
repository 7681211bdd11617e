"""Compress one model with several methods, sizes and calibration seeds, and judge them all on texts that none
of them saw.

    python examples/compare_methods.py build/smollm2/dense --calibrate build/smollm2/calibration.jsonl \\
        --judge wikipedia=build/smollm2/heldout.jsonl --judge news=build/smollm2/news.jsonl \\
        --out build/compare --remove 0.20 --seeds 0 --methods "training-free" "int8 dense"

Every folder and every judgement is kept in --out and not made again, so that a stopped run goes on, and
several can share the work by seed; the table is over everything that is asked for, and results.csv and
results.png have the same. `MLP bytes` are those of the stored MLP tensors over those of a bf16 dense MLP
(floating-point factors count as bf16, however they are stored).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import pathlib
import statistics
import sys
from typing import Any

from neuronmlp_plugin import cli

Row = dict[str, Any]
UNIFORM_UV = ("--allocation", "uniform", "--form", "uv")


@dataclasses.dataclass(frozen=True)
class Method:
    """What is run, on the result of which other method (None: the dense model), and what its result depends
    on.
    """

    command: str
    options: tuple[str, ...] = ()
    parent: str | None = None
    sized: bool = True
    seeded: bool = True


METHODS = {
    "plain SVD": Method("compress", ("--method", "plain", *UNIFORM_UV), seeded=False),
    "SVD-LLM (whitened, uniform)": Method("compress", ("--method", "whitened", *UNIFORM_UV)),
    "MoDeGPT's MLP step": Method("compress", ("--method", "modegpt")),
    "training-free, uv": Method("compress", ("--form", "uv", "--groups", "1", "--channels", "keep")),
    "one group, all channels": Method("compress", ("--groups", "1", "--channels", "keep")),
    "groups, all channels": Method("compress", ("--tp", "4", "--channels", "keep")),
    "fewer channels alone": Method("compress", ("--form", "narrow", "--tp", "4")),
    "training-free, global": Method("compress", ("--tp", "4", "--allocation", "global")),
    "training-free, tp 4": Method("compress", ("--tp", "4")),
    "training-free": Method("compress"),
    "refined, from global": Method("refine", parent="training-free, global"),
    "refined": Method("refine", parent="training-free"),
    "refined, tp 4": Method("refine", parent="training-free, tp 4"),
    "refined, int8, from global": Method("quantize", parent="refined, from global"),
    "refined, int8": Method("quantize", parent="refined"),
    "refined through int8": Method("refine", ("--storage", "int8"), parent="training-free"),
    "int8 dense": Method("quantize", sized=False, seeded=False),
}
DEFAULT = (
    "plain SVD",
    "SVD-LLM (whitened, uniform)",
    "MoDeGPT's MLP step",
    "training-free",
    "training-free, tp 4",
    "refined",
    "int8 dense",
    "refined, int8",
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One checkpoint of the comparison."""

    method: str
    removed: float
    seed: int

    def folder(self, out: pathlib.Path) -> pathlib.Path:
        method, slug = (
            METHODS[self.method],
            "".join(c if c.isalnum() else "-" for c in self.method).strip("-"),
        )
        return (
            out
            / slug
            / "-".join(
                [f"{self.removed:.2f}"] * method.sized + [f"seed{self.seed}"] * method.seeded + ["model"]
            )
        )


def neuronmlp(*arguments: object) -> str:
    """What the command prints; run in this process, since importing torch takes longer than a small model."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = cli.main([str(argument) for argument in arguments])
    if status:
        raise SystemExit(status)
    return printed.getvalue()


def build(cell: Cell, args: argparse.Namespace) -> pathlib.Path:
    """The cell's folder, made with its parents if it is not there."""
    method, target = METHODS[cell.method], cell.folder(args.out)
    if target.exists():
        return target
    source = (
        args.model if method.parent is None else build(dataclasses.replace(cell, method=method.parent), args)
    )
    command = [method.command, source, "--out", target, *method.options]
    if method.command == "compress":
        kind = method.options[1] if "--method" in method.options else "two-sided"
        analysis = args.out / "analysis" / (f"{kind}-{cell.seed}" if method.seeded else kind)
        command += [
            "--remove",
            cell.removed,
            "--seed",
            cell.seed,
            "--text",
            args.calibrate,
            "--analysis",
            analysis,
            "--quiet",
        ]
        command += args.compress_options.split()
    if method.command == "refine":
        command += [
            "--dense",
            args.model,
            "--text",
            args.calibrate,
            "--seed",
            cell.seed,
            "--quiet",
            *args.refine_options.split(),
        ]
    if method.command == "quantize":
        command += ["--text", args.calibrate, "--quiet"]
    print(f"{cell.method}, removed {cell.removed:.2f}, seed {cell.seed}", file=sys.stderr, flush=True)
    neuronmlp(*command)
    return target


def judge(cells: list[Cell], text: pathlib.Path, name: str, tokens: int, args: argparse.Namespace) -> None:
    """`FOLDER.NAME.json` beside each cell's folder; the dense model runs once for all that are missing."""
    missing = [folder for cell in cells if not _judged(folder := cell.folder(args.out), name).exists()]
    if not missing:
        return
    options = ("--dense", args.model, "--text", text, "--tokens", tokens, "--window", args.window, "--json")
    found = json.loads(neuronmlp("evaluate", *missing, *options))
    for folder, quality in zip(missing, found if len(missing) > 1 else [found], strict=True):
        _judged(folder, name).write_text(json.dumps(quality))


def _judged(folder: pathlib.Path, text: str) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.{text}.json")


def sizes_of(folder: pathlib.Path) -> dict[str, float]:
    """`removed_ratio` and `bytes_ratio` of a folder; from its report where it is an ordinary one, without a
    block.
    """
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        return json.loads(neuronmlp("inspect", folder, "--json"))
    report = json.loads((folder / "neuronmlp_report.json").read_text())
    return {"removed_ratio": report["block"]["removed_ratio"], "bytes_ratio": report["bytes_ratio"]}


def rows(cells: list[Cell], texts: list[str], out: pathlib.Path) -> list[Row]:
    """One row a cell and text."""
    found: list[Row] = []
    for cell in cells:
        folder, method = cell.folder(out), METHODS[cell.method]
        held = sizes_of(folder)
        for text in texts:
            quality = json.loads(_judged(folder, text).read_text())
            key = {
                "method": cell.method,
                "removed": cell.removed if method.sized else 0.0,
                "seed": cell.seed if method.seeded else "",
            }
            sizes = {
                "removed_ratio": round(held["removed_ratio"], 5),
                "mlp_bytes_over_bf16": round(held["bytes_ratio"], 4),
            }
            found.append(
                {**key, "text": text, **sizes, **{name: round(value, 5) for name, value in quality.items()}}
            )
    return found


def print_table(found: list[Row]) -> None:
    """Mean over the seeds, with the range of the perplexity ratio."""
    print(
        f"{'method':<29}{'removed':>8}{'MLP bytes':>10}  "
        f"{'text':<11}{'ppl/dense':>10}{'(range)':>16}{'KL':>9}{'top-1':>8}"
    )
    for (method, removed, text), group in grouped(found, "method", "removed", "text").items():
        ratios = [row["perplexity_ratio"] for row in group]
        digits = ".3f" if max(ratios) < 100 else ".0f"
        spread = f"({min(ratios):{digits}}-{max(ratios):{digits}})"
        ratio, size, kl, top1 = (
            mean(group, name)
            for name in ("perplexity_ratio", "mlp_bytes_over_bf16", "kl_divergence", "top1_agreement")
        )
        print(
            f"{method:<29}{removed:>8.2f}{size:>10.3f}  "
            f"{text:<11}{ratio:>10{digits}}{spread:>16}{kl:>9.4f}{top1:>8.1%}"
        )


def grouped(found: list[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some columns, in the order in which they are met."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def mean(group: list[Row], name: str) -> float:
    return statistics.mean(row[name] for row in group)


def plot(found: list[Row], path: pathlib.Path) -> None:
    """Perplexity over dense against bytes, a panel a text, a line a method, every seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    texts = grouped(found, "text")
    figure, panels = pyplot.subplots(
        1, len(texts), figsize=(5.2 * len(texts), 4.6), layout="constrained", sharey=True, squeeze=False
    )
    for axes, ((text,), mine) in zip(panels[0], texts.items(), strict=True):
        for index, ((name,), group) in enumerate(grouped(mine, "method").items()):
            points = [(row["mlp_bytes_over_bf16"], row["perplexity_ratio"]) for row in group]
            sizes = grouped(group, "removed").values()
            line = sorted(
                (mean(size, "mlp_bytes_over_bf16"), mean(size, "perplexity_ratio")) for size in sizes
            )
            axes.scatter(
                *zip(*points, strict=True), s=22, color=f"C{index}", marker="oosD^vX"[index % 7], label=name
            )
            axes.plot(*zip(*line, strict=True), color=f"C{index}", linewidth=1)
        axes.set(yscale="log", ylim=(0.95, 12), xlabel="MLP bytes over bf16 dense", title=f"judged on {text}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_yticks([1, 1.1, 1.2, 1.5, 2, 3, 5, 10], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("perplexity over dense (cut at 12)")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def named_text(value: str) -> tuple[str, pathlib.Path]:
    name, _, path = value.rpartition("=")
    return name or "held-out", pathlib.Path(path)


def named_methods() -> str:
    """For `--help`: a line a method, as it is typed, with what it runs."""
    lines = ["methods (type the quotes as well; * by default):"]
    for name, method in METHODS.items():
        runs = " ".join((method.command, *method.options))
        after = f', after "{method.parent}"' if method.parent else ""
        lines.append(f'  {"*" if name in DEFAULT else " "} "{name}":  {runs}{after}')
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=named_methods(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=pathlib.Path, help="the dense model's folder")
    parser.add_argument(
        "--calibrate",
        type=pathlib.Path,
        required=True,
        metavar="FILE",
        help="text to compress and refine with",
    )
    parser.add_argument(
        "--judge",
        type=named_text,
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="a text to judge on, and what to call it; may be given again",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for everything that is made")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=DEFAULT,
        metavar="NAME",
        help="which to compare (default: those marked * below)",
    )
    parser.add_argument(
        "--remove", type=float, nargs="+", default=[0.20], help="shares to take away (default 0.20)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of the choice of calibration text (default 0)"
    )
    parser.add_argument(
        "--judge-tokens", type=int, nargs="+", default=[16384], help="of every text, or one number a text"
    )
    parser.add_argument("--window", type=int, default=1024, help="of the judging (default %(default)s)")
    parser.add_argument(
        "--compress-options", default="", help="more options for `neuronmlp compress`, in one string"
    )
    parser.add_argument(
        "--refine-options", default="", help="more options for `neuronmlp refine`, in one string"
    )
    args = parser.parse_args()
    cells = list(
        dict.fromkeys(
            Cell(name, removed if METHODS[name].sized else 0.0, seed if METHODS[name].seeded else 0)
            for name in args.methods
            for removed in args.remove
            for seed in args.seeds
        )
    )
    for cell in cells:
        build(cell, args)
    for (name, text), tokens in zip(args.judge, itertools.cycle(args.judge_tokens)):
        judge(cells, text, name, tokens, args)
    found = rows(cells, [name for name, _ in args.judge], args.out)
    with (args.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)
    plot(found, args.out / "results.png")
    print_table(found)


if __name__ == "__main__":
    main()
