"""The norm in front of an MLP, taken into the MLP's chain: one call for both, where vLLM's eager norm is ten
operators of torch.

A decoder layer of vLLM ends in its second norm and its MLP. So a module that computes both takes the norm's
place in the layer, and the MLP behind it hands its input on (on several ranks it still sums what it is
given). That is right only where nothing stands between them, which is read from the layer's own source.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm

from neuronmlp_plugin.serving.cpu.chain import Chain

logger = init_logger("vllm.neuronmlp")
NORM = "post_attention_layernorm"
END = [
    f"hidden_states, residual = self.{NORM}(hidden_states, residual)",
    "hidden_states = self.mlp(hidden_states)",
    "return (hidden_states, residual)",
]


class Normed(nn.Module):
    """x, residual -> what a chain makes of the normed x + residual, and x + residual, in the place of vLLM's
    norm. Without a residual (the first layer), of another dtype or under a compiler, which makes one loop of
    vLLM's norm and of what stands before it, that norm runs.
    """

    def __init__(self, norm: RMSNorm, chain: Chain) -> None:
        super().__init__()
        self.weight = norm.weight  # under the name that a checkpoint has for it
        self.norm, self.chain = norm, chain
        chain.add_norm(norm.weight, norm.variance_epsilon)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None or torch.compiler.is_compiling() or not self.chain.norms(x, residual):
            return self.otherwise(x, residual)
        return self.chain.normed(x, residual)

    def otherwise(self, x: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return self.norm(x) if residual is None else self.norm(x, residual)


class NormedMLP(Normed):
    """With the MLP in the chain."""

    part = "MLP"  # in profiles

    def otherwise(self, x: torch.Tensor, residual: torch.Tensor | None) -> Any:
        x, residual = self.norm(x, residual)
        return self.chain(x), residual


def take_norm(layer: nn.Module | None, mlp: nn.Module, chain: Chain) -> bool:
    """Have the second norm of a decoder layer compute its MLP, too, and the first one be one call; whether
    the second could be taken.
    """
    if layer is None or getattr(layer, "mlp", None) is not mlp or not ends_in_mlp(layer):
        return False
    norm: Any = getattr(layer, NORM)
    if not _is_plain(norm, chain):
        return False
    setattr(layer, NORM, NormedMLP(norm, chain))
    first: Any = getattr(layer, "input_layernorm", None)
    if _is_plain(first, chain):
        layer.input_layernorm = Normed(
            first, Chain(chain.in_features, chain.in_features, chain.dtype).finish()
        )
    _say()
    return True


def _is_plain(norm: Any, chain: Chain) -> bool:
    """An RMS norm of vLLM's over whole rows, in the dtype of the chain."""
    if type(norm) is not RMSNorm or norm.variance_size_override is not None:
        return False
    weight = norm.weight
    return isinstance(weight, nn.Parameter) and (weight.dtype, len(weight)) == (
        chain.dtype,
        chain.in_features,
    )


@functools.cache
def _say() -> None:
    logger.info("neuronmlp: without torch.compile, the norm before an MLP is a part of its fused products")


def ends_in_mlp(layer: nn.Module) -> bool:
    """Whether the layer's forward ends in its norm and its MLP (`END`), and calls them nowhere else. What it
    does only with a part that this layer lacks (`if self.part is not None`) does not count.
    """
    try:
        source = textwrap.dedent(inspect.getsource(type(layer).forward))
        (function,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return False
    absent = {f"self.{name} is not None" for name, part in vars(layer).items() if part is None}

    def idle(statement: ast.stmt) -> bool:
        return (
            isinstance(statement, ast.If) and not statement.orelse and ast.unparse(statement.test) in absent
        )

    lines = [ast.unparse(statement) for statement in function.body if not idle(statement)]
    once = all(source.count(f"self.{name}(") == 1 for name in (NORM, "mlp"))
    return once and lines[-len(END) :] == END
