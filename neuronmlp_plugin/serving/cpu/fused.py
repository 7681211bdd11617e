"""A low-rank projection as one call of `product.c`: all its products in two stages, nothing concatenated or
sliced in between.

Used where one rank owns the whole MLP; under tensor parallelism the stages are parted by collectives, and
`gemm.py` serves them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from neuronmlp_plugin.models.parallel_mlp import Linear
from neuronmlp_plugin.models.sharding import Shard
from neuronmlp_plugin.serving.cpu.compiled import Product, load_products

LANES = 16
INPUT, OUTPUT, SCRATCH, NOTHING = 0, 1, 2, -1
DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # of weights, in the order of `product.c`

Weight = tuple[torch.Tensor, torch.Tensor | None]  # `[out, in]`, and its scales `[out]` where it is int8


def weights_of(shard: Shard) -> tuple[Weight | None, Weight | None]:
    """`first` and `second` with their scales."""
    first = None if shard.first is None else (shard.first, shard.scales[0])
    return first, None if shard.second is None else (shard.second, shard.scales[1])


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`[N, K]` -> panels `[ceil(N / 16), K, 16]`, the last one padded with zeros."""
    n, k = weight.shape
    padded = F.pad(weight, (0, 0, 0, -n % LANES))
    return padded.reshape(-1, LANES, k).transpose(1, 2).contiguous()


class Chain:
    """Products that are added one by one, then run by what `finish` returns.

    x `[..., in]` -> `[..., out]`, in the dtype of x; sums are fp32.
    """

    def __init__(self, in_features: int, out_features: int, scratch_width: int) -> None:
        self.widths = (in_features, out_features, scratch_width)
        self.products: list[Product] = []
        self.kept: list[torch.Tensor | None] = []  # what the products point to

    def add(
        self,
        stage: int,
        weight: Weight,
        x: tuple[int, int],
        y: tuple[int, int],
        addend: tuple[int, int] | None = None,
    ) -> None:
        """Add y = x weight^T + addend; `x`, `y` and `addend` are (buffer, first column)."""
        matrix, scale = weight
        packed = pack(matrix)
        n, k = matrix.shape
        add_of, add_at = addend or (NOTHING, 0)
        add_width = self.widths[add_of] if addend else 0
        places = (x[1], self.widths[x[0]], y[1], self.widths[y[0]], add_at, add_width, x[0], y[0], add_of)
        pointers = (packed.data_ptr(), None if scale is None else scale.data_ptr())
        self.products.append(Product(stage, k, n, *places, DTYPES.index(matrix.dtype), *pointers))
        self.kept += [packed, scale]

    def finish(self) -> Linear:
        """The callable, once all products are in. It goes through a torch operator, so that torch.compile
        leaves it whole.
        """
        self.products.sort(key=lambda product: product.stage)
        self.array = (Product * len(self.products))(*self.products)
        _CHAINS.append(self)
        # A tensor, not a number: a number would be baked into compiled graphs and keep them from being
        # shared.
        handle = torch.tensor(len(_CHAINS) - 1, dtype=torch.int64)
        out_features = self.widths[1]
        return lambda x: torch.ops.neuronmlp.chain(x, handle, out_features)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        function = load_products()
        assert function is not None
        rows = x.reshape(-1, self.widths[0]).to(torch.float32).contiguous()
        tokens = rows.shape[0]
        output = torch.empty(tokens, self.widths[1], dtype=torch.float32)
        scratch = torch.empty(tokens, self.widths[2], dtype=torch.float32)
        pointers = (rows.data_ptr(), output.data_ptr(), scratch.data_ptr())
        function(ctypes.addressof(self.array), len(self.products), *pointers, tokens)
        return output.to(x.dtype).reshape(*x.shape[:-1], self.widths[1])


_CHAINS: list[Chain] = []
_LIBRARY = torch.library.Library("neuronmlp", "DEF")
_LIBRARY.define("chain(Tensor x, Tensor handle, SymInt out_features) -> Tensor")
_LIBRARY.impl("chain", lambda x, handle, _out_features: _CHAINS[handle.item()].run(x), "CPU")
_LIBRARY.impl("chain", lambda x, _handle, out_features: x.new_empty((*x.shape[:-1], out_features)), "Meta")


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a chain can run here: weights in this machine's memory, of a dtype that it knows, and a
    compiled library.
    """
    return device.type == "cpu" and dtype in DTYPES and load_products() is not None


def fused_gate_up(shards: Sequence[Shard], intermediate_size: int) -> Linear:
    """x `[..., H]` -> `[..., 2 I]`, gate first, of one rank. A compact matrix's z is written where its pivots
    belong in the output.
    """
    hidden = next(s.first.shape[1] for s in shards if s.first is not None)
    chain = Chain(hidden, 2 * intermediate_size, sum(s.slots for s in shards if s.form == "uv"))
    scratch = 0
    for index, shard in enumerate(shards):
        start = index * intermediate_size
        first, second = weights_of(shard)
        assert first is not None
        if second is None or shard.form == "compact":
            z = (OUTPUT, start)
        else:
            z, scratch = (SCRATCH, scratch), scratch + shard.slots
        chain.add(0, first, (INPUT, 0), z)
        if second is not None:
            chain.add(1, second, z, (OUTPUT, start + shard.pivots))
    return chain.finish()


def fused_down(shard: Shard, intermediate_size: int) -> Linear:
    """h `[..., I]` -> y `[..., H]` of one rank; the pivots of a compact matrix are the addend of its first
    product.
    """
    first, second = weights_of(shard)
    assert second is not None
    chain = Chain(intermediate_size, second[0].shape[0], shard.slots)
    if first is None:
        chain.add(0, second, (INPUT, 0), (OUTPUT, 0))
        return chain.finish()
    chain.add(0, first, (INPUT, shard.pivots), (SCRATCH, 0), (INPUT, 0) if shard.form == "compact" else None)
    chain.add(1, second, (SCRATCH, 0), (OUTPUT, 0))
    return chain.finish()
