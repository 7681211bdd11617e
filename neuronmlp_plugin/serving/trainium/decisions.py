"""Kernels or torch, for each layer of a configured NxDI model."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

import torch

from neuronmlp_plugin.models.factors import MLPLayer
from neuronmlp_plugin.serving.trainium.config import block_of, options_of
from neuronmlp_plugin.serving.trainium.dispatch import Decision, decide
from neuronmlp_plugin.serving.trainium.kernel_path import declined
from nki_kernels.backend import HAS_NKI

OLDEST_NKI = (0, 2)


def layer_decisions(config: Any) -> list[dict[str, Decision]]:
    """Phase -> decision of every layer of a model with our block. Raises UsageError where kernels are
    required and cannot run.
    """
    block, neuron, options = block_of(config), config.neuron_config, options_of(config)
    assert block is not None
    unavailable = kernels_unavailable(neuron.on_cpu, installed_nki())
    decisions = []
    for index, stored in enumerate(block.layers):
        why = (
            None
            if unavailable or options.kernels == "off"
            else _declined(stored, neuron.tp_degree, neuron.torch_dtype)
        )
        decisions.append(decide(options, unavailable, why, index))
    return decisions


def installed_nki() -> str | None:
    """Version of the vendor's `nki`, or None."""
    try:
        return importlib.metadata.version("nki") if HAS_NKI else None
    except importlib.metadata.PackageNotFoundError:
        return None


def kernels_unavailable(on_cpu: bool, nki: str | None) -> str | None:
    """Why no kernel can run at all, or None."""
    if on_cpu:
        return "NxDI runs on the CPU (on_cpu)"
    if nki is None or tuple(map(int, nki.split(".")[:2])) < OLDEST_NKI:
        return f"the kernels need nki 0.2 (Neuron SDK 2.28) or later, found {nki or 'none'}"
    return None


@functools.cache
def _declined(stored: MLPLayer, tp: int, dtype: torch.dtype) -> str | None:
    return declined(stored, tp, dtype)
