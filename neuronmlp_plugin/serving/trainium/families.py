"""Which NxDI model classes get low-rank MLPs. One subclass maker serves all (application.py); this table is
all that differs.
"""

from __future__ import annotations

from typing import Any

# Our architecture's key in NxDI's MODEL_TYPES -> the key whose class serves it where NxDI has none of its
# own.
# NxDI gained Mistral in 0.9; before that its demo runs Mistral through the Llama class, and so do we.
FAMILIES = {"llama": None, "qwen2": None, "qwen3": None, "mistral": "llama"}


def install(model_types: dict[str, dict[str, Any]]) -> None:
    """Replace the causal-lm class of each family by its low-rank subclass, in NxDI's own table. Idempotent."""
    from neuronmlp_plugin.serving.trainium.application import low_rank_application

    stock = {key: dict(tasks) for key, tasks in model_types.items()}
    for key, stand_in in FAMILIES.items():
        tasks = stock.get(key) or stock.get(stand_in or "")
        if tasks and not getattr(tasks["causal-lm"], "serves_low_rank", False):
            model_types[key] = {**tasks, "causal-lm": low_rank_application(tasks["causal-lm"])}
