"""How vLLM's merged gate/up and down layers load and run low-rank matrices; the mathematics is
`models/definition.py`, and `models/gather.py` where ranks share the factors of one group.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import LinearMethodBase

from neuronmlp_plugin.checkpoint.reader import FactorFile, check_int8, checked_tensor, is_finite
from neuronmlp_plugin.errors import CheckpointError, NonFiniteError
from neuronmlp_plugin.models.definition import (
    Factors,
    Linear,
    bind,
    dequantize,
    factors_of,
    plain_linear,
    share_of,
)
from neuronmlp_plugin.models.factors import SCALE, Matrix, MLPLayer
from neuronmlp_plugin.models.gather import GatherDown, GatherGateUp, Shard, gather_shard
from neuronmlp_plugin.serving.cpu.chain import usable
from neuronmlp_plugin.serving.cpu.collectives import tensor_parallel
from neuronmlp_plugin.serving.cpu.crossover import limit_of
from neuronmlp_plugin.serving.cpu.finite import parent_of
from neuronmlp_plugin.serving.cpu.fused import Large, fused_down, fused_gate_up, fused_mlp
from neuronmlp_plugin.serving.cpu.gemm import prepacked_linear
from neuronmlp_plugin.serving.options import Options

MakeLinear = Callable[..., Linear]
Tensors = dict[str, torch.Tensor]


class LowRankMethod(LinearMethodBase):
    """Common half of both layers. vLLM makes one instance a layer, so what arrives is kept in it.

    `parent`: "model.layers.3.mlp". Full tensors come in one by one; as soon as a projection is whole this
    rank's part is cut, cast and kept, and the full tensors are dropped. With `overlay` the dense weights that
    arrive are ignored and the factor file is read instead. Raises UsageError where so many ranks cannot serve
    the layer.
    """

    projections: tuple[str, ...]
    draws = False  # `--load-format dummy`: small random numbers of the right shapes, no checkpoint is read

    def __init__(self, parent: str, stored: MLPLayer, options: Options, overlay: FactorFile | None) -> None:
        self.parent, self.stored = parent, stored
        self.options, self.overlay = options, overlay
        self.collectives = tensor_parallel()
        self.gathers = stored.gathers(self.collectives.size)
        self.arrived: dict[str, Tensors] = {p: {} for p in self.projections}
        self.owned: dict[str, Factors] = {}
        self.shards: dict[str, Shard] = {}
        self.run: Linear | None = None

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
            # A dotted name is a parameter `weight` of a child: vLLM's loaders look a tensor's name up among
            # the named parameters.
            owner, _, leaf = suffix.rpartition(".")
            if owner and not hasattr(layer, owner):
                layer.add_module(owner, nn.Module())
            module = layer.get_submodule(owner)
            parameter = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            parameter.weight_loader = self._loader(suffix)  # type: ignore[attr-defined]
            module.register_parameter(leaf, parameter)
        # vLLM builds layers inside torch's device context, so an empty tensor tells where they are to be.
        self.device = parameter.device
        self.fuses = fuses(self.options, self.gathers, self.device, self.dtype)

    def _sizes(self, projection: str) -> dict[str, tuple[int, ...]]:
        return self.stored.matrix(projection).stored_shapes()

    def _loader(self, suffix: str) -> Callable[..., None]:
        def load(_parameter: nn.Parameter, tensor: torch.Tensor, shard_id: int | None = None) -> None:
            # An argument before vLLM 0.2x, then an attribute of the tensor.
            position = getattr(tensor, "shard_id", shard_id)
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
        # A projection at a time: the whole tensors of all would be the model once more, on every rank.
        if len(self.arrived[projection]) == len(sizes):
            self._keep(projection, self.arrived.pop(projection))

    def _keep(self, projection: str, whole: Tensors) -> None:
        """Check a projection's tensors and keep what this rank computes with."""
        matrix, tp, rank = self.stored.matrix(projection), self.collectives.size, self.collectives.rank
        whole = self._checked(matrix, whole)
        if self.gathers:
            self.shards[projection] = gather_shard(matrix, whole, tp, rank)
            return
        mine = share_of(matrix, whole, tp, rank)
        if tp > 1:  # a view would keep the whole tensor alive
            mine = {name: tensor.clone() for name, tensor in mine.items()}
        self.owned[projection] = factors_of(matrix, mine)

    def _checked(self, matrix: Matrix, tensors: Tensors) -> Tensors:
        """On this device: int8 as it is where the products read it, everything else in the model's dtype."""
        where = f"{self.parent}.{matrix.projection}"
        if matrix.spec.is_int8:
            weights = {suffix: tensors[suffix] for suffix in matrix.tensor_shapes()}
            for suffix, weight in weights.items():
                check_int8(weight, tensors[suffix + SCALE], f"{where}.{suffix}")
            if self.fuses:
                return {suffix: tensor.to(self.device) for suffix, tensor in tensors.items()}
            tensors = {suffix: dequantize(w, tensors[suffix + SCALE]) for suffix, w in weights.items()}
        elif self.overlay is None:  # the tensors of a factor file were checked as they were read
            for suffix, weight in tensors.items():  # vLLM does not say which file
                checked_tensor(weight, f"{where}.{suffix}", pathlib.Path("checkpoint"))
        served = {suffix: weight.to(self.device, self.dtype) for suffix, weight in tensors.items()}
        for suffix, weight in served.items():
            if weight.dtype is not tensors[suffix].dtype and not is_finite(weight):
                raise NonFiniteError(
                    f"checkpoint: {where}.{suffix}: expected finite values in {self.dtype}, as it is served, "
                    "found NaN or Inf; serve in another --dtype."
                )
        return served

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Prepack the shards. A tensor that never came is refused: vLLM itself would serve random numbers."""
        if self.overlay is not None:
            for projection in self.projections:
                read = self.overlay.stored if self.stored[projection].is_int8 else self.overlay.tensor
                for suffix in self._sizes(projection):
                    self._arrive(projection, suffix, read(f"{self.parent}.{projection}.{suffix}"))
        elif self.draws:
            self._draw()
        missing = [
            f"{self.parent}.{p}.{s}"
            for p, got in self.arrived.items()
            for s in self._sizes(p)
            if s not in got
        ]
        if missing:
            raise CheckpointError(
                f"checkpoint: expected a tensor {missing[0]} ({len(missing)} of this layer are missing), "
                "found none."
            )
        make_linear = prepacked_linear if self.options.fast_path else plain_linear
        if self.fuses:
            # Nothing is let go here: gate's and up's numbers may wait for the down layer, which vLLM comes to
            # last.
            self._fuse(silu_mlp(parent_of(layer)))
            return
        if self.gathers:
            self.run = self._gathered(make_linear)
        else:
            self.run = self._one_by_one(make_linear)
        self.owned, self.shards = {}, {}

    def _draw(self) -> None:
        for projection in self.projections:
            for suffix, shape in self._sizes(projection).items():
                numbers = torch.empty(shape).uniform_(-1e-3, 1e-3)
                if suffix.endswith(SCALE):
                    numbers = torch.full(shape, 1e-5, dtype=torch.float32)
                elif self.stored[projection].is_int8:
                    numbers = torch.randint(-127, 128, shape, dtype=torch.int8)
                self._arrive(projection, suffix, numbers)

    def _mine(self, projection: str) -> tuple[Matrix, Factors]:
        """What this rank owns of a layer that fits the ranks: a smaller matrix and its numbers."""
        return self.stored.share(self.collectives.size).matrix(projection), self.owned[projection]

    def _large(self) -> Large:
        """vLLM's products for the numbers of tokens at which this machine runs them faster, a second copy of
        the weights; None where the chain is as fast.
        """
        limit = limit_of(self.dtype)
        return None if limit == float("inf") else (limit, self._one_by_one(prepacked_linear))

    def _fuse(self, mlp: Any) -> None:
        """One call for all products, of the whole `mlp` where that can be, and it is not None."""
        raise NotImplementedError

    def _one_by_one(self, make_linear: MakeLinear) -> Linear:
        """A call for each product."""
        raise NotImplementedError

    def _gathered(self, make_linear: MakeLinear) -> Linear:
        """A call for each product, with the collectives of scheme `gather` between them."""
        raise NotImplementedError

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert self.run is not None and bias is None
        return self.run(x)


class LowRankGateUpMethod(LowRankMethod):
    projections = ("gate_proj", "up_proj")

    def _fuse(self, mlp: Any) -> None:
        if mlp is None:  # else the down layer, which comes next, fuses all
            self.run = fused_gate_up(*self.pair(), self.dtype, self._large())
            self.owned = {}

    def pair(self) -> tuple[tuple[Matrix, Factors], tuple[Matrix, Factors]]:
        """What this rank owns of gate and up."""
        return self._mine("gate_proj"), self._mine("up_proj")

    def _one_by_one(self, make_linear: MakeLinear) -> Linear:
        gate, up = (bind(*owned, make_linear) for owned in self.pair())
        return lambda x: torch.cat((gate(x), up(x)), dim=-1)

    def _gathered(self, make_linear: MakeLinear) -> Linear:
        return GatherGateUp([self.shards[p] for p in self.projections], self.collectives, make_linear)


class LowRankDownMethod(LowRankMethod):
    projections = ("down_proj",)

    def _fuse(self, mlp: Any) -> None:
        if mlp is None:
            self.run = fused_down(self._mine("down_proj"), self.dtype, self._large())
        else:
            # vLLM's MLP is down(act(gate_up(x))): with the first two as identities, down is called with x
            # itself.
            gate_up: LowRankGateUpMethod = mlp.gate_up_proj.quant_method
            self.run = self._whole(gate_up)
            gate_up.run, gate_up.owned = _unchanged, {}
            mlp.act_fn = nn.Identity()
        self.owned = {}

    def _whole(self, gate_up: LowRankGateUpMethod) -> Linear:
        """The MLP in one call; vLLM's layers before it hand its input on as it is."""
        before, after = gate_up._large(), self._large()
        large = None
        if before and after:
            large = before[0], lambda x: after[1](silu_and_mul(before[1](x)))
        return fused_mlp(*gate_up.pair(), self._mine("down_proj"), self.dtype, large)

    def _one_by_one(self, make_linear: MakeLinear) -> Linear:
        return bind(*self._mine("down_proj"), make_linear)

    def _gathered(self, make_linear: MakeLinear) -> Linear:
        return GatherDown(self.shards["down_proj"], self.collectives, make_linear)


def fuses(options: Options, gathers: bool, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a layer's products run as a chain: possible, wanted, and no slower than vLLM's."""
    return options.fast_path and not gathers and usable(device, dtype) and limit_of(dtype) > 1


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Gate and up side by side `[..., 2 k]` -> `[..., k]`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def silu_mlp(mlp: nn.Module | None) -> Any:
    """The module if it is a gated MLP of vLLM's with both its layers ours and fused, and nothing else in it
    that a chain would leave out; else None.
    """
    children = dict(mlp.named_children()) if mlp is not None else {}
    if set(children) != {"gate_up_proj", "act_fn", "down_proj"}:
        return None
    methods = [getattr(children[name], "quant_method", None) for name in ("gate_up_proj", "down_proj")]
    ours = all(isinstance(method, LowRankMethod) and method.fuses for method in methods)
    # The down layer exchanges act_fn when all else is done: whoever asks later finds that it is not vLLM's.
    return mlp if ours and isinstance(children["act_fn"], SiluAndMul) else None
