"""A low-rank projection as one call of `product.c`: all its products in two stages, nothing concatenated or
sliced in between.

Used where a rank owns whole groups of the MLP. Where ranks share one group's factors (models/gather.py) the
stages are parted by collectives, and `gemm.py` serves them.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from neuronmlp_plugin.models.definition import Factors, Linear, Weight
from neuronmlp_plugin.models.factors import Matrix
from neuronmlp_plugin.serving.cpu.compiled import Product, load_products

LANES = 16
INPUT, OUTPUT, SCRATCH, NOTHING = 0, 1, 2, -1
DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # of weights, in the order of `product.c`

Owned = tuple[Matrix, Factors]


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


def blocks_of(weight: Weight, blocks: int) -> list[Weight]:
    """The blocks of a stacked factor."""
    scales = [None] * blocks if weight.scale is None else weight.scale.chunk(blocks)
    return [Weight(values, scale) for values, scale in zip(weight.values.chunk(blocks), scales, strict=True)]


def fused_gate_up(gate: Owned, up: Owned) -> Linear:
    """x `[..., H]` -> `[..., 2 k]`, gate first, of the k channels that a rank owns. A compact matrix's z is
    written where its pivots belong in the output.
    """
    channels, hidden = gate[0].channels, gate[0].hidden_size
    outside = sum(m.groups * m.rank for m, _ in (gate, up) if not m.pivots)
    chain, scratch = Chain(hidden, 2 * channels, outside), 0
    for at, (matrix, (first, second)) in zip((0, channels), (gate, up), strict=True):
        assert first is not None
        if second is None:
            chain.add(0, first, (INPUT, 0), (OUTPUT, at))
            continue
        pairs = zip(blocks_of(first, matrix.groups), blocks_of(second, matrix.groups), strict=True)
        for group, (u, v) in enumerate(pairs):
            start = at + group * channels // matrix.groups
            z = (OUTPUT, start) if matrix.pivots else (SCRATCH, scratch)
            scratch += 0 if matrix.pivots else matrix.rank
            chain.add(0, u, (INPUT, 0), z)
            chain.add(1, v, z, (OUTPUT, start + matrix.pivots))
    return chain.finish()


def fused_down(down: Owned) -> Linear:
    """h `[..., k]` -> y `[..., H]`, a summand where a rank owns a share of the channels; the pivots of a
    compact matrix are the addend of its first product.
    """
    matrix, (first, second) = down
    assert second is not None
    chain = Chain(matrix.channels, matrix.hidden_size, matrix.groups * matrix.rank)
    if first is None:
        chain.add(0, second, (INPUT, 0), (OUTPUT, 0))
        return chain.finish()
    width = matrix.channels // matrix.groups
    for group, weight in enumerate(blocks_of(first, matrix.groups)):
        start = group * width
        addend = (INPUT, start) if matrix.pivots else None
        chain.add(0, weight, (INPUT, start + matrix.pivots), (SCRATCH, group * matrix.rank), addend)
    chain.add(1, second, (SCRATCH, 0), (OUTPUT, 0))
    return chain.finish()
