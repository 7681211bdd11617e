"""Kernels or torch, for each layer of a configured NxDI model."""

from __future__ import annotations

import functools
from typing import Any

import torch

from neuronmlp_plugin.models.projection import MLPShape, ProjectionSpec
from neuronmlp_plugin.serving.trainium.config import block_of, options_of
from neuronmlp_plugin.serving.trainium.dispatch import Decision, decide
from neuronmlp_plugin.serving.trainium.kernel_path import SCHEME, declined
from nki_kernels.backend import HAS_NKI


def layer_decisions(config: Any) -> list[dict[str, Decision]]:
    """Phase -> decision of every layer of a model with our block. Raises UsageError where kernels are required and cannot run."""
    block, neuron, options = block_of(config), config.neuron_config, options_of(config)
    assert block is not None
    unavailable = kernels_unavailable(neuron.on_cpu, options.tp_scheme, HAS_NKI)
    decisions = []
    for index, specs in enumerate(block.layers):
        why = None if unavailable or options.kernels == "off" else _declined(tuple(specs.items()), block.shape, neuron.tp_degree, neuron.torch_dtype)
        decisions.append(decide(options, unavailable, why, index))
    return decisions


def kernels_unavailable(on_cpu: bool, scheme: str, has_nki: bool) -> str | None:
    """Why no kernel can run at all, or None."""
    if on_cpu:
        return "NxDI runs on the CPU (on_cpu)"
    if scheme != SCHEME:
        return f"the kernels implement tp_scheme {SCHEME!r}, not {scheme!r}"
    if not has_nki:
        return "there is no `nki` package (it comes with the Neuron SDK from 2.27 on; 2.26 has only its predecessor)"
    return None


@functools.cache
def _declined(specs: tuple[tuple[str, ProjectionSpec], ...], shape: MLPShape, tp: int, dtype: torch.dtype) -> str | None:
    return declined(dict(specs), shape, tp, dtype)
