"""Serve on AWS Trainium through NxD Inference: our MLPs inside its models, chosen by vllm-neuron from its own
table of classes.
"""

from __future__ import annotations

import importlib.util


def register() -> None:
    """Put low-rank models into NxDI's MODEL_TYPES as soon as someone imports it.

    Idempotent; imports neither torch nor NxDI, which costs seconds and, in vLLM's API server, is never
    needed. Silent where NxDI is absent.
    """
    if importlib.util.find_spec("neuronx_distributed_inference") is None:
        return
    from neuronmlp_plugin.serving.trainium import metrics
    from neuronmlp_plugin.serving.trainium.after_import import run_after_import

    metrics.prepare()
    run_after_import("neuronx_distributed_inference.utils.constants", _install)


def _install(constants: object) -> None:
    from neuronmlp_plugin.serving.trainium.families import install

    install(constants.MODEL_TYPES)  # type: ignore[attr-defined]
