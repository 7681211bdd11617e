"""How vLLM's merged gate/up and down layers load and run low-rank matrices; the mathematics is
`models/parallel_mlp.py`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase

from neuronmlp_plugin.checkpoint.reader import FactorFile, check_int8, checked_tensor
from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.models.int8 import dequantize
from neuronmlp_plugin.models.parallel_mlp import Down, GateUp, Linear, plain_linear
from neuronmlp_plugin.models.projection import SCALE, MLPShape, ProjectionSpec, stored_shapes
from neuronmlp_plugin.models.sharding import Shard, check_divisible, shard_down, shard_gate_up, whole_shard
from neuronmlp_plugin.serving.cpu.collectives import tensor_parallel
from neuronmlp_plugin.serving.cpu.fused import fused_down, fused_gate_up, usable
from neuronmlp_plugin.serving.cpu.gemm import prepacked_linear
from neuronmlp_plugin.serving.options import Options

Specs = dict[str, ProjectionSpec]
MakeLinear = Callable[[torch.Tensor], Linear]


class LowRankMethod(LinearMethodBase):
    """Common half of both layers. vLLM makes one instance a layer, so what arrives is kept in it.

    `parent`: "model.layers.3.mlp". Full tensors come in one by one; as soon as a projection is whole its
    shard is cut, cast and kept, and the full tensors are dropped. With `overlay` the dense weights that
    arrive are ignored and the factor file is read instead.
    """

    projections: tuple[str, ...]

    def __init__(
        self, parent: str, specs: Specs, shape: MLPShape, options: Options, overlay: FactorFile | None
    ) -> None:
        self.parent, self.specs, self.shape = parent, specs, shape
        self.options, self.overlay = options, overlay
        self.collectives = tensor_parallel()
        self.arrived: dict[str, dict[str, torch.Tensor]] = {p: {} for p in self.projections}
        self.shards: dict[str, Shard] = {}
        self.run: Linear | None = None
        check_divisible(shape.intermediate_size, self.collectives.size, options.tp_scheme)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register an empty parameter under every name that a checkpoint may bring; their loader takes whole
        tensors of any size.
        """
        self.dtype = params_dtype
        suffixes = (
            {"weight"} if self.overlay is not None else {s for p in self.projections for s in self._sizes(p)}
        )
        for suffix in sorted(suffixes):
            owner, _, leaf = suffix.rpartition(".")
            if owner and not hasattr(layer, owner):
                layer.add_module(owner, nn.Module())
            module = layer.get_submodule(owner)
            parameter = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            parameter.weight_loader = self._loader(suffix)  # type: ignore[attr-defined]
            module.register_parameter(leaf, parameter)
        self.device = parameter.device
        self.fuses = self.options.fast_path and self.collectives.size == 1 and usable(self.device, self.dtype)

    def _sizes(self, projection: str) -> dict[str, tuple[int, ...]]:
        return stored_shapes(projection, self.specs[projection], self.shape)

    def _loader(self, suffix: str) -> Callable[..., None]:
        def load(_parameter: nn.Parameter, tensor: torch.Tensor, shard_id: int | None = None) -> None:
            position = getattr(
                tensor, "shard_id", shard_id
            )  # an argument before vLLM 0.2x, then an attribute of the tensor
            if self.overlay is None:
                self._arrive(self.projections[position or 0], suffix, tensor)

        return load

    def _arrive(self, projection: str, suffix: str, tensor: torch.Tensor) -> None:
        sizes, name = self._sizes(projection), f"{self.parent}.{projection}.{suffix}"
        if suffix not in sizes or tuple(tensor.shape) != sizes[suffix]:
            expected = list(sizes[suffix]) if suffix in sizes else "no such tensor"
            raise CheckpointError(
                f"{name}: expected {expected} from the checkpoint's config, found {list(tensor.shape)}."
            )
        self.arrived[projection][suffix] = tensor
        if len(self.arrived[projection]) == len(sizes):
            self.shards[projection] = self._cut(projection, self.arrived.pop(projection))

    def _cut(self, projection: str, weights: dict[str, torch.Tensor]) -> Shard:
        spec = self.specs[projection]
        if spec.is_int8:
            quantized = {suffix: weight for suffix, weight in weights.items() if suffix + SCALE in weights}
            for suffix, weight in quantized.items():
                check_int8(weight, weights[suffix + SCALE], f"{self.parent}.{projection}.{suffix}")
            if self.fuses:
                return whole_shard(
                    projection, spec, {suffix: weight.to(self.device) for suffix, weight in weights.items()}
                )
            weights = {
                suffix: dequantize(weight, weights[suffix + SCALE]) for suffix, weight in quantized.items()
            }
        elif self.overlay is None:  # the tensors of a factor file were checked as they were read
            for suffix, weight in weights.items():
                checked_tensor(
                    weight, f"{self.parent}.{projection}.{suffix}", pathlib.Path("checkpoint")
                )  # vLLM does not say which file
        cast = {suffix: weight.to(self.device, self.dtype) for suffix, weight in weights.items()}
        cut = shard_down if projection == "down_proj" else shard_gate_up
        return cut(spec, cast, self.collectives.size, self.collectives.rank, self.options.tp_scheme)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Prepack the shards. A tensor that never came is refused: vLLM itself would serve random numbers."""
        if self.overlay is not None:
            for projection in self.projections:
                read = self.overlay.stored if self.specs[projection].is_int8 else self.overlay.tensor
                for suffix in self._sizes(projection):
                    self._arrive(projection, suffix, read(f"{self.parent}.{projection}.{suffix}"))
        missing = [
            f"{self.parent}.{p}.{s}"
            for p, got in self.arrived.items()
            for s in self._sizes(p)
            if s not in got
        ]
        if missing:
            raise CheckpointError(
                f"checkpoint: expected a tensor {missing[0]} ({len(missing)} of this layer are missing), found none."
            )
        shards = [self.shards[p] for p in self.projections]
        if self.fuses:
            self.run = self._fused(shards)
        else:
            self.run = self._one_by_one(shards, prepacked_linear if self.options.fast_path else plain_linear)
        self.shards = {}

    def _fused(self, shards: list[Shard]) -> Linear:
        """One call for all products."""
        raise NotImplementedError

    def _one_by_one(self, shards: list[Shard], make_linear: MakeLinear) -> Linear:
        """A call for each product, with the collectives of the scheme between them."""
        raise NotImplementedError

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert self.run is not None and bias is None
        return self.run(x)


class LowRankGateUpMethod(LowRankMethod):
    projections = ("gate_proj", "up_proj")

    def _fused(self, shards: list[Shard]) -> Linear:
        return fused_gate_up(shards, self.shape.intermediate_size)

    def _one_by_one(self, shards: list[Shard], make_linear: MakeLinear) -> Linear:
        return GateUp(
            shards, self.shape.intermediate_size, self.collectives, self.options.tp_scheme, make_linear
        )


class LowRankDownMethod(LowRankMethod):
    projections = ("down_proj",)

    def _fused(self, shards: list[Shard]) -> Linear:
        return fused_down(shards[0], self.shape.intermediate_size)

    def _one_by_one(self, shards: list[Shard], make_linear: MakeLinear) -> Linear:
        return Down(shards[0], self.collectives, self.options.tp_scheme, make_linear)
