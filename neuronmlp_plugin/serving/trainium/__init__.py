"""Serve on AWS Trainium through NxD Inference: our MLPs inside its models, chosen by vllm-neuron from its own
table of classes.

This file is the registration. It imports neither torch nor NxDI, which costs seconds and, in vLLM's API
server, is never needed: it acts on their modules once somebody else has imported them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

# Key in NxDI's MODEL_TYPES -> the key whose class serves it where NxDI has none of its own. NxDI gained
# Mistral in 0.9; before that its demo runs Mistral through the Llama class, and so do we.
FAMILIES = {"llama": None, "qwen2": None, "qwen3": None, "mistral": "llama"}
Action = Callable[[ModuleType], None]


def register() -> None:
    """Put low-rank models into NxDI's MODEL_TYPES as soon as someone imports it. Idempotent; silent where
    NxDI is absent.
    """
    if importlib.util.find_spec("neuronx_distributed_inference") is None:
        return
    from neuronmlp_plugin.serving.trainium import metrics

    metrics.prepare()
    run_after_import(
        "neuronx_distributed_inference.utils.constants", lambda table: install(table.MODEL_TYPES)
    )
    run_after_import("vllm_neuron.worker.neuronx_distributed_model_loader", _watch_options)


def install(model_types: dict[str, dict[str, Any]]) -> None:
    """Replace the causal-lm class of each family by its low-rank subclass, in NxDI's own table.
    Idempotent.
    """
    from neuronmlp_plugin.serving.trainium.application import low_rank_application

    # A copy: Mistral is to stand on NxDI's own Llama, not on the subclass that has just taken its place.
    stock = {key: dict(tasks) for key, tasks in model_types.items()}
    for key, stand_in in FAMILIES.items():
        tasks = stock.get(key) or stock.get(stand_in or "")
        if tasks and not getattr(tasks["causal-lm"], "serves_low_rank", False):
            model_types[key] = {**tasks, "causal-lm": low_rank_application(tasks["causal-lm"])}


def _watch_options(loader: ModuleType) -> None:
    """Have each call of vllm-neuron's `get_neuron_model` checked (config.py): what it does not read of
    `additional_config`, and which folder it was asked for, never reaches a class of NxDI.
    """
    from neuronmlp_plugin.serving.trainium.config import checked_request

    loader.get_neuron_model = checked_request(loader.get_neuron_model)  # type: ignore[attr-defined]


def run_after_import(name: str, action: Action) -> None:
    """Call `action(module)` now if the module is loaded, else right after its own code has run; the action
    must be idempotent.
    """
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(finder, _Watcher) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(name, action))


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds the module as Python's own finder does, and has the action run at the end of its execution."""

    def __init__(self, name: str, action: Action) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == self.name else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
