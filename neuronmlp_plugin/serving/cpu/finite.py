"""Only finite numbers are served: every tensor is looked at as it is served, and a request whose logits are
not finite ends with an error instead of a sample.

Three of vLLM's own seams: the method of the embeddings and the head, which our quantization config chooses;
its count of NaN logits (VLLM_COMPUTE_NANS_IN_LOGITS; a 0 in the environment turns all of this off); and
`scheduler_cls`.
"""

from __future__ import annotations

import functools
import os
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm import envs
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.v1.request import RequestStatus

from neuronmlp_plugin.checkpoint.reader import is_finite
from neuronmlp_plugin.errors import NonFiniteError

COUNT, RAISE = "VLLM_COMPUTE_NANS_IN_LOGITS", "VLLM_RAISE_ON_LOGIT_NANS"
SCHEDULER = "neuronmlp_plugin.serving.cpu.scheduler.FiniteScheduler"
_PARENTS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class CheckedEmbedding(UnquantizedEmbeddingMethod):
    """vLLM's method of the embedding and the head. It is called when all weights have been loaded, and first
    of all layers, which is when the whole model is looked at.
    """

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        check_model(_root(layer))
        super().process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return marked(super().apply(layer, x, bias))


def check_model(model: nn.Module) -> None:
    """Every parameter and table of a loaded model, once. Raises NonFiniteError."""
    if model in _CHECKED:
        return
    _CHECKED.add(model)
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if tensor.is_floating_point() and not is_finite(tensor):
                raise NonFiniteError(
                    f"checkpoint: {name}: expected finite values in {tensor.dtype}, as it is served, found "
                    "NaN or Inf; serve in another --dtype, or copy the file again."
                )


def marked(logits: torch.Tensor) -> torch.Tensor:
    """`[rows, V]`, in place: a row with an Inf becomes one of NaN, which is what vLLM counts. Raises
    NonFiniteError where that vLLM is to stop, and is too old to (0.11 to 0.16 at least count, and sample).
    """
    if not is_finite(logits):
        if os.environ.get(RAISE) == "1" and RAISE not in envs.environment_variables:
            raise NonFiniteError(
                "logits: expected finite values, found NaN or Inf; the engine stops, start it in another "
                "--dtype."
            )
        logits[~torch.isfinite(logits).all(-1)] = float("nan")
    return logits


def watch_logits(vllm_config: Any) -> None:
    """Have vLLM count NaN logits, and end their requests: by our scheduler where it was asked for, or where
    it runs in this process and can be put in; else by stopping the engine, which ends all of them. Called
    before vLLM chooses its scheduler and reads its environment.
    """
    if os.environ.setdefault(COUNT, "1") == "0":
        return
    scheduling, backend = (
        vllm_config.scheduler_config,
        vllm_config.parallel_config.distributed_executor_backend,
    )
    here = backend == "uni" and not scheduling.async_scheduling and hasattr(RequestStatus, "FINISHED_ERROR")
    if here and scheduling.scheduler_cls is None:
        scheduling.scheduler_cls = SCHEDULER
    elif scheduling.scheduler_cls != SCHEDULER:
        os.environ.setdefault(RAISE, "1")


@functools.cache
def watch_parents() -> None:
    """Have torch say, from now on, which module each became a part of: vLLM hands us layers without their
    model.
    """
    register_module_module_registration_hook(_registered)


def parent_of(module: nn.Module) -> nn.Module | None:
    known = _PARENTS.get(module)
    return known() if known is not None else None


def _registered(parent: nn.Module, _name: str, child: nn.Module | None) -> None:
    if child is not None:
        _PARENTS[child] = weakref.ref(parent)


def _root(module: nn.Module) -> nn.Module:
    parent = parent_of(module)
    return module if parent is None else _root(parent)
