"""Reports to make pages of: one with everything in it, text that tries to be markup included, and one of
what every run knows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from neuronmlp_plugin.models.factors import PROJECTIONS
from neuronmlp_plugin.reporting.run_report import Report

SCRIPT = "<script>document.title = 'owned'</script>"
IMAGE = "<img src=x onerror=alert(1)> & \"quoted\" 'text'"
LAYERS, FULL = 24, 576


def plain_report() -> Report:
    """What every compression that was judged knows."""
    rows = [_row(layer, name) for layer in range(LAYERS) for name in PROJECTIONS]
    specs = [
        {"form": row["form"]} if row["rank"] is None else {"form": row["form"], "rank": row["rank"]}
        for row in rows
    ]
    layers = [dict(zip(PROJECTIONS, specs[i : i + 3], strict=True)) for i in range(0, len(specs), 3)]
    provenance = {
        "model": "/models/tiny",
        "method": "two-sided",
        "allocation": "global",
        "seed": 0,
        "calibration_tokens": 98304,
    }
    found = {
        "block": {
            "created_by": "neuronmlp 0.1.0",
            "removed_ratio": 0.2,
            "layers": layers,
            "provenance": provenance,
        },
        "matrices": rows,
        "notes": [],
        "quality": quality(1.36),
        "loss_by_size": [
            {"removed_ratio": r / 10, "predicted_loss": (r / 10) ** 2 * 10} for r in range(1, 7)
        ],
    }
    return Report.of(found)


def full_report() -> Report:
    """Everything that a report can hold, with an int8 matrix, a fallback, and hostile text wherever text comes from
    outside.
    """
    report = plain_report()
    report.block["layers"][1]["up_proj"]["dtype"] = "int8"
    report.block["provenance"] |= {
        "model": f"/models/{SCRIPT}",
        "text": IMAGE,
        "calibration_digest": "0123456789abcdef",
        "factors_only": False,
    }
    ranks = [round(i * FULL / 63) for i in range(64)]
    spectrum = {
        name: [round((1 - k / FULL) ** 2 * math.exp(-k / 200), 6) for k in ranks] for name in PROJECTIONS
    }
    story = "Once upon a time, a lighthouse keeper lit the lamp and "
    more = {
        "notes": [f"layer 1 up_proj: {IMAGE}"],
        "spectra": {"ranks": ranks, "layers": [spectrum] * LAYERS},
        "samples": {
            "new_tokens": 48,
            "chat_template": True,
            "texts": [
                {
                    "prompt": f"Tell me {SCRIPT}",
                    "dense": story + "slept well " * 20,
                    "compressed": story + IMAGE + " " + SCRIPT,
                },
                {"prompt": "A word", "dense": "x" * 300, "compressed": ""},
            ],
        },
        "base": {"name": SCRIPT, "license": {"license": "apache-2.0"}},
        "versions": {"torch": "2.13.0"},
        "refinement": {
            "method": "block reconstruction",
            "before": quality(1.36),
            "after": quality(1.18),
            "history": [{"step": i, "tokens": 4096 * i, "loss": 3.0 / (i + 1)} for i in range(20)],
        },
    }
    return dataclasses.replace(report, **more)


def quality(ratio: float) -> dict[str, float]:
    return {
        "reference_perplexity": 20.0,
        "candidate_perplexity": 20.0 * ratio,
        "kl_divergence": (ratio - 1) * 0.9,
        "top1_agreement": 0.7,
        "num_tokens": 8184,
        "perplexity_ratio": ratio,
    }


def _row(layer: int, name: str) -> dict[str, Any]:
    dense = layer == 0 and name != "gate_proj"
    rank = None if dense else 560 - 16 * ((layer + PROJECTIONS.index(name)) % 20)
    error = 0.0 if dense else 0.02 + 0.01 * layer
    return {
        "layer": layer,
        "projection": name,
        "form": "dense" if dense else "compact",
        "rank": rank,
        "channels": 1536,
        "parameters": 884736 if rank is None else rank * (FULL + 1536 - rank),
        "predicted_loss": error**2,
        "predicted_error": error,
        "achieved_error": error * 1.1,
        "rounding": 0.0 if dense else 0.002,
    }
