"""The files of a report: JSON in, page and card out. The page is one file that needs nothing else: no script,
no request, everything that is not ours escaped. The card says what the folder is, how it was made, how to
serve it, and its numbers.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jinja2

from neuronmlp_plugin.checkpoint.files import read_config
from neuronmlp_plugin.checkpoint.hub import hub_name, is_hub_id
from neuronmlp_plugin.checkpoint.writer import save_json, save_text
from neuronmlp_plugin.errors import CheckpointError, reason_of
from neuronmlp_plugin.reporting import view
from neuronmlp_plugin.reporting.figures import (
    Plot,
    agreement_plot,
    error_plot,
    history_plot,
    loss_plot,
    rank_plot,
    spectrum_plots,
    to_svg,
)
from neuronmlp_plugin.reporting.run_report import Report
from neuronmlp_plugin.reporting.view import base_name, forms, headline, judged_on

REPORT_FILE = "neuronmlp_report.json"
PAGE_FILE = "neuronmlp_report.html"
CARD_FILE = "README.md"


def read_report(folder: pathlib.Path) -> Report:
    """The report that a compression left in `folder`. Raises CheckpointError where there is none."""
    path = folder / REPORT_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected the report that `neuronmlp compress` writes, found: {reason_of(error)}; name "
            "a folder that it wrote."
        ) from error
    if not isinstance(found, dict) or not (found.get("block") and found.get("matrices")):
        raise CheckpointError(
            f"{path}: expected a report with `block` and `matrices`, found another JSON file; compress again."
        )
    with _whole(folder):
        return Report.of(found)


@contextlib.contextmanager
def _whole(folder: pathlib.Path) -> Iterator[None]:
    """Refuses a report in which something is missing or of another kind: only a JSON edited by hand is like
    that.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, SyntaxError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{folder / REPORT_FILE}: expected a whole report, found one that cannot be shown ({reason}); "
            "compress again."
        ) from error


def write_report(folder: pathlib.Path, report: Report) -> None:
    """All three files."""
    save_json(folder / REPORT_FILE, report.to_json())
    write_page(folder, report)
    write_card(folder, report)


def write_page(folder: pathlib.Path, report: Report) -> pathlib.Path:
    """`neuronmlp_report.html`, whole or not at all."""
    with _whole(folder):
        page = render_page(report)
    save_text(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def write_card(folder: pathlib.Path, report: Report) -> pathlib.Path:
    """`README.md`, whole or not at all."""
    with _whole(folder):
        card = render_card(report)
    save_text(folder / CARD_FILE, card)
    return folder / CARD_FILE


def render_page(report: Report) -> str:
    """The page of a report; it leaves out what the report has no numbers for."""
    template = _environment().get_template("page.html")
    return template.render(report=report, view=view, **_plots(report), **_refined(report.refinement))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = to_svg
    return environment


def _plots(report: Report) -> dict[str, list[Plot]]:
    """The plots of each section; those that this report has no numbers for are left out."""
    return {
        "size_plots": _there(rank_plot(report), loss_plot(report)),
        "error_plots": _there(error_plot(report), agreement_plot(report)),
        "spectrum_plots": spectrum_plots(report),
    }


def _refined(refinement: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "refinement": refinement,
        "refinement_plots": _there(history_plot(refinement)) if refinement else [],
    }


def _there(*plots: Plot | None) -> list[Plot]:
    return [plot for plot in plots if plot is not None]


_LONGEST_CARD = 1 << 18  # bytes
_LICENSE_KEYS = ("license", "license_name", "license_link")


def base_facts(folder: pathlib.Path) -> dict[str, Any]:
    """What the card says about the dense model: its name, and the license that its own card states, if
    any.
    """
    name = hub_name(folder) or _name_in_config(folder) or folder.absolute().name
    return {"name": name, "license": _stated_license(folder / "README.md")}


def _name_in_config(folder: pathlib.Path) -> str | None:
    """The hub's id that `_name_or_path` remembers from where the model was loaded, if it is one."""
    name = read_config(folder).get("_name_or_path")
    return name if isinstance(name, str) and is_hub_id(name) else None


def _stated_license(readme: pathlib.Path) -> dict[str, str]:
    """A card that cannot be read states nothing: it is the base's, and no reason to fail."""
    from huggingface_hub import metadata_load

    if not readme.is_file() or readme.stat().st_size > _LONGEST_CARD:
        return {}
    try:
        stated = metadata_load(readme) or {}
        return {key: stated[key] for key in _LICENSE_KEYS if isinstance(stated.get(key), str)}
    except Exception:  # YAML leads to many kinds
        return {}


def render_card(report: Report) -> str:
    """README.md of the folder, from its report."""
    return "\n".join([*_front_matter(report), *_body(report)]) + "\n"


def _front_matter(report: Report) -> list[str]:
    from huggingface_hub import ModelCardData

    stated = (report.base or {}).get("license") or {}
    data = ModelCardData(
        base_model=base_name(report),
        base_model_relation="quantized",
        library_name="neuronmlp",
        pipeline_tag="text-generation",
        tags=["neuronmlp", "low-rank", "svd", "vllm"],
        **stated,
    )
    return ["---", data.to_yaml().rstrip(), "---"]


def _body(report: Report) -> list[str]:
    removed = headline(report)[0].value
    shown = "ranks, errors, spectra and sample texts" if report.samples else "ranks, errors and spectra"
    return [
        "",
        f"# {_plain(base_name(report))}, {removed} of the MLP parameters removed",
        "",
        f"A compressed {_plain(base_name(report))}: {_changed(report)}; everything",
        f"else is unchanged. **[Open `neuronmlp_report.html`](neuronmlp_report.html)** for {shown}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {tile.label} | {tile.value} ({tile.note}) |" for tile in headline(report)),
        "",
        *_made(report),
        *_serving(report),
    ]


def _changed(report: Report) -> str:
    """What became of the MLPs."""
    if report.ordinary:
        return f"its MLPs keep {report.matrices[0]['channels']} of their channels each, all matrices dense"
    kept = {row["channels"] for row in report.matrices}
    fewer = f", with {min(kept)} to {max(kept)} channels a layer" if len(kept) > 1 else ""
    return f"its MLP matrices are stored as low-rank factors ({_plain(forms(report))}){fewer}"


def _made(report: Report) -> list[str]:
    settings = report.provenance
    tokens, quality = settings.get("calibration_tokens"), report.quality
    lines = ["## How it was made", ""]
    lines.append(
        f"`neuronmlp compress`, method {settings.get('method')}, allocation {settings.get('allocation')}, "
        f"seed {settings.get('seed')}."
    )
    if tokens:
        lines.append(f"Calibrated on {tokens:,} tokens (digest `{settings.get('calibration_digest')}`).")
    if report.refinement:
        lines.append(f"Refined afterwards: {_plain(str(report.refinement.get('method')))}.")
    if quality:
        lines.append(
            f"Judged on {quality.num_tokens:,} tokens {_plain(judged_on(report))}; other text can fare worse."
        )
    return [*lines, ""]


def _serving(report: Report) -> list[str]:
    beside = report.provenance.get("factors_only")
    command = (
        "vllm serve MODEL --quantization neuronmlp   # MODEL: the dense folder that holds this one"
        if beside
        else "vllm serve DIR"
    )
    if report.ordinary:
        needs = (
            "An ordinary Hugging Face folder with a smaller `intermediate_size`: any engine loads it, "
            "without neuronmlp."
        )
        return ["## How to serve it", "", needs]
    needs = (
        "With vLLM and neuronmlp installed (extra `cpu`); a plain `from_pretrained` of the folder stops with "
        "an error, by design."
    )
    return ["## How to serve it", "", needs, "", "```bash", command, "```"]


def _plain(text: str) -> str:
    """Text that Markdown leaves alone: every punctuation mark that could mean something is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~])", r"\\\1", re.sub(r"\s+", " ", text))
