"""The model card of a compressed folder: what it is, how it was made, how to serve it, its numbers."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from neuronmlp_plugin.checkpoint.files import read_config
from neuronmlp_plugin.checkpoint.hub import hub_name, is_hub_id
from neuronmlp_plugin.reporting.view import base_name, forms, headline, judged_on

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
    import yaml
    from huggingface_hub import metadata_load

    try:
        stated = metadata_load(readme) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: stated[key] for key in _LICENSE_KEYS if isinstance(stated.get(key), str)}


def render_card(report: dict[str, Any]) -> str:
    """README.md of the folder, from its report."""
    return "\n".join([*_front_matter(report), *_body(report)]) + "\n"


def _front_matter(report: dict[str, Any]) -> list[str]:
    from huggingface_hub import ModelCardData

    stated = (report.get("base") or {}).get("license") or {}
    data = ModelCardData(
        base_model=base_name(report),
        base_model_relation="quantized",
        library_name="neuronmlp",
        pipeline_tag="text-generation",
        tags=["neuronmlp", "low-rank", "svd", "vllm"],
        **stated,
    )
    return ["---", data.to_yaml().rstrip(), "---"]


def _body(report: dict[str, Any]) -> list[str]:
    removed = headline(report)[0].value
    shown = (
        "ranks, errors, spectra and sample texts" if report.get("samples") else "ranks, errors and spectra"
    )
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


def _changed(report: dict[str, Any]) -> str:
    """What became of the MLPs."""
    if report.get("ordinary"):
        return f"its MLPs keep {report['matrices'][0]['channels']} of their channels each, all matrices dense"
    kept = {row.get("channels") for row in report["matrices"]}
    fewer = f", with {min(kept)} to {max(kept)} channels a layer" if len(kept) > 1 else ""
    return f"its MLP matrices are stored as low-rank factors ({_plain(forms(report))}){fewer}"


def _made(report: dict[str, Any]) -> list[str]:
    settings = report["block"].get("provenance") or {}
    tokens, quality = settings.get("calibration_tokens"), report.get("quality")
    lines = ["## How it was made", ""]
    lines.append(
        f"`neuronmlp compress`, method {settings.get('method')}, allocation {settings.get('allocation')}, "
        f"seed {settings.get('seed')}."
    )
    if tokens:
        lines.append(f"Calibrated on {tokens:,} tokens (digest `{settings.get('calibration_digest')}`).")
    if report.get("refinement"):
        lines.append(f"Refined afterwards: {_plain(str(report['refinement'].get('method')))}.")
    if quality:
        lines.append(
            f"Judged on {quality['num_tokens']:,} tokens {_plain(judged_on(report))}; other text can fare "
            "worse."
        )
    return [*lines, ""]


def _serving(report: dict[str, Any]) -> list[str]:
    beside = (report["block"].get("provenance") or {}).get("factors_only")
    command = (
        "vllm serve MODEL --quantization neuronmlp   # MODEL: the dense folder that holds this one"
        if beside
        else "vllm serve DIR"
    )
    if report.get("ordinary"):
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
