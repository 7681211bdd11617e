"""What the page says, as strings and rows ready to be set: every number is formatted here, nothing is escaped
yet. Sample texts come in pieces that say where two models differ, word by word.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
from typing import Any

from neuronmlp_plugin.calibration.quality import Quality
from neuronmlp_plugin.reporting.run_report import Report

_DASH = "–"
MEASURES = {
    "perplexity_ratio": "Perplexity over dense",
    "kl_divergence": "KL from dense",
    "top1_agreement": "Same top token",
}


@dataclasses.dataclass(frozen=True)
class Tile:
    """One number of the headline: what it is, the number, and what it is compared with."""

    label: str
    value: str
    note: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt with what both models made of it, in pieces that say where they differ."""

    prompt: str
    dense: Parts
    compressed: Parts
    verdict: str


def base_name(report: Report) -> str:
    """What the dense model is called: as recorded, else its folder's name."""
    recorded = (report.base or {}).get("name")
    return str(recorded or pathlib.Path(report.provenance.get("model") or "").name or "unknown model")


def headline(report: Report) -> list[Tile]:
    """What was removed and what it cost."""
    kept = sum(row["parameters"] for row in report.matrices)
    removed = report.removed_ratio
    dense = kept / (1 - removed)
    tiles = [
        Tile(
            "MLP parameters removed",
            f"{removed:.1%}",
            f"{dense / 1e6:,.1f} M before, {kept / 1e6:,.1f} M stored",
        )
    ]
    if report.bytes_ratio is not None and report.weight_bytes is not None:
        served = f"of bf16: {report.weight_bytes / 1e6:,.1f} MB as served"
        tiles.append(Tile("MLP bytes", f"{report.bytes_ratio:.1%}", served))
    quality = report.quality
    if quality is None:
        why = "since rounding to int8" if report.has_int8 else "no text was kept to judge on"
        return [*tiles, Tile("Quality", "not measured", why)]
    notes = {
        "perplexity_ratio": quality.perplexities,
        "kl_divergence": "nats a token; 0 is the same model",
        "top1_agreement": "of the positions, as the dense model",
    }
    return tiles + [Tile(MEASURES[name], quality.written(name), note) for name, note in notes.items()]


def asked(report: Report) -> str:
    """What `--target` or `--faster` asked for and got, in a sentence; empty where a size was asked for."""
    if report.target is not None:
        target = report.target
        return (
            f"Asked for {target['asked']}: the largest removal that keeps it, as stored, after "
            f"{len(target['probes'])} probes."
        )
    if report.decode is not None:
        line = (
            "Asked for decode {asked:g} times faster: the MLPs are × {simulated_speedup:.3f} (simulated: one "
            "token, one core of trn1)."
        )
        return line.format(**report.decode)
    return ""


def judged_on(report: Report) -> str:
    """Which text the quality is of."""
    named = report.judged_on
    return (
        f"of {named}"
        if named
        else "from the end of the calibration text that nothing was calibrated on: the same kind of text"
    )


def forms(report: Report) -> str:
    """`88 compact, 2 dense`: how the matrices are stored, most common first."""
    kinds = [_stored_as(report, row) for row in report.matrices]
    counted = sorted(((kinds.count(kind), kind) for kind in set(kinds)), key=lambda pair: (-pair[0], pair[1]))
    return ", ".join(f"{count} {kind}" for count, kind in counted)


def matrix_rows(report: Report) -> list[list[str]]:
    """The table of all matrices, under MATRIX_COLUMNS."""
    return [
        [
            str(row["layer"]),
            row["projection"],
            _stored_as(report, row),
            f"{row['parameters']:,}",
            *_errors(row),
        ]
        for row in report.matrices
    ]


def _errors(row: dict[str, Any]) -> list[str]:
    """Rank and errors; a matrix that stayed as it was has neither."""
    shapes = {
        "rank": "{}",
        "predicted_loss": "{:.3g}",
        "predicted_error": "{:.4f}",
        "achieved_error": "{:.4f}",
        "rounding": "{:.1e}",
    }
    return [
        _DASH if row["rank"] is None and not row[key] else _number(row[key], shape)
        for key, shape in shapes.items()
    ]


MATRIX_COLUMNS = (
    "Layer",
    "Matrix",
    "Stored as",
    "Parameters",
    "Rank",
    "Predicted loss",
    "Predicted error",
    "Achieved error",
    "Rounding",
)


def choice(report: Report) -> str:
    """How the ranks were chosen, and what the predicted loss that they are told with is."""
    settings = report.provenance
    allocation = settings.get("allocation", "unknown")
    least = "The ranks were chosen across all matrices for the least predicted loss"
    known = {
        "global": least,
        "measured": f"{least}, corrected by what each proved to be worth",
        "uniform": "Every matrix was cut by the same share, whatever its predicted loss",
    }
    weighted = (
        ", weighted by how much the model's own loss minds" if settings.get("method") == "two-sided" else ""
    )
    chosen = known.get(str(allocation), f"The ranks were chosen by allocation {allocation}")
    return f"{chosen}: what the cuts do to the outputs of the matrices{weighted}."


def samples(report: Report) -> list[Sample]:
    """Prompts with both continuations; none where the run made none."""
    return [_sample(entry) for entry in (report.samples or {}).get("texts", [])]


def _sample(entry: dict[str, str]) -> Sample:
    dense, compressed = entry["dense"], entry["compressed"]
    same = common_words(dense, compressed)
    if dense == compressed:
        verdict = "The same text."
    elif same:
        verdict = f"The same up to word {same}."
    else:
        verdict = "Different from the first word."
    return Sample(entry["prompt"], *word_differences(dense, compressed), verdict)


def refinement_rows(refinement: dict[str, Any]) -> list[list[str]]:
    """Quality before and after, a row a measure; a dash for what was not measured."""
    pair = [Quality.of(refinement.get(when)) for when in ("before", "after")]
    measures = {
        "candidate_perplexity": "Perplexity",
        **MEASURES,
        "kl_divergence": "KL from dense, nats a token",
    }
    return [
        [label, *(_DASH if quality is None else quality.written(name) for quality in pair)]
        for name, label in measures.items()
    ]


def _number(value: Any, shape: str) -> str:
    return shape.format(value) if isinstance(value, (int, float)) else _DASH


def provenance_rows(report: Report) -> list[tuple[str, str]]:
    """Settings, calibration, digests and versions, as recorded."""
    rows = [("created by", str(report.block.get("created_by", "unknown")))]
    for key, value in report.provenance.items():
        parts = (
            {f"{key}: {part}": found for part, found in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
        rows += [(_label(part), _value(found)) for part, found in parts.items()]
    return rows + [(f"version of {name}", str(version)) for name, version in (report.versions or {}).items()]


def _label(key: str) -> str:
    return key.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return _DASH
    return f"{value:,}" if isinstance(value, int) else re.sub(r"\s+", " ", str(value))


def _stored_as(report: Report, row: dict[str, Any]) -> str:
    """The form, and the dtype where the block names one (`compact int8`)."""
    dtype = report.block["layers"][row["layer"]][row["projection"]].get("dtype")
    return f"{row['form']} {dtype}" if dtype else str(row["form"])


Parts = list[tuple[str, bool]]  # pieces of a text in order, and whether the other text lacks them
_LEAST_RUN = 2  # a lone "the" that both texts happen to have is no agreement


def word_differences(left: str, right: str) -> tuple[Parts, Parts]:
    """Both texts in pieces that, joined, give them back; True marks words that the other text has not at that
    place.
    """
    a, b = _words(left), _words(right)
    matcher = difflib.SequenceMatcher(
        None, [word.strip() for word in a], [word.strip() for word in b], autojunk=False
    )
    # A beginning that both share counts however short it is: it is not by chance.
    same = [
        block
        for block in matcher.get_matching_blocks()
        if block.size >= _LEAST_RUN or block.a == block.b == 0
    ]
    return _marked(a, [(block.a, block.size) for block in same]), _marked(
        b, [(block.b, block.size) for block in same]
    )


def common_words(left: str, right: str) -> int:
    """How many words both texts begin with."""
    pairs = list(zip(left.split(), right.split(), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _words(text: str) -> list[str]:
    """Words with the space before them; trailing space is a piece of its own."""
    return re.findall(r"\s*\S+|\s+$", text)


def _marked(words: list[str], same: list[tuple[int, int]]) -> Parts:
    """Pieces of `words` given the runs (start, length) that are the same; the space before a difference is
    not part of it.
    """
    parts: Parts = []
    end = 0
    for start, length in [*same, (len(words), 0)]:
        different = "".join(words[end:start])
        bare = different.lstrip()
        parts += [
            (different[: len(different) - len(bare)], False),
            (bare, True),
            ("".join(words[start : start + length]), False),
        ]
        end = start + length
    return [(text, differs) for text, differs in parts if text]
