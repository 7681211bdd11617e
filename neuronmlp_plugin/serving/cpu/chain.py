"""Small matrix products that run in one call of `product.c`, stage after stage, nothing concatenated or
sliced in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F

from neuronmlp_plugin.models.definition import Linear, Weight
from neuronmlp_plugin.serving.cpu.compiled import Product, ProductChain, load_products

LANES = 16
TILE_ROWS = 32  # numbers of k that a tile register holds, and a cache line
LARGE_PAGE = 2 << 20  # bytes
INPUT, OUTPUT, SCRATCH, NOTHING = 0, 1, 2, -1
DTYPES = (torch.float32, torch.bfloat16)  # of activations
WEIGHTS = (*DTYPES, torch.int8)  # in the order of `product.c`
SILU = 3  # in the place of a weight's dtype


class Place(NamedTuple):
    """Columns of a buffer, from `at` on."""

    buffer: int
    at: int = 0

    def plus(self, columns: int) -> Place:
        return Place(self.buffer, self.at + columns)


NOWHERE = Place(NOTHING)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`[N, K]` -> panels of 16 rows, the last one padded with zeros: fp32 and int8 `[ceil(N / 16), K, 16]`,
    bf16 `[ceil(N / 16), K' / 2, 16, 2]` with K' = K rounded up to 32 with zeros.
    """
    n, k = weight.shape
    if weight.dtype is torch.bfloat16:
        # Two neighbours of k beside each other for each of the 16 rows: what one bf16 instruction multiplies
        # and adds.
        padded = F.pad(weight, (0, -k % TILE_ROWS, 0, -n % LANES))
        return padded.reshape(-1, LANES, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()
    return F.pad(weight, (0, 0, 0, -n % LANES)).reshape(-1, LANES, k).transpose(1, 2).contiguous()


class Chain:
    """Products that are added one by one, then run by what `finish` returns.

    x `[..., in]` -> `[..., out]`, both of `dtype`; what a stage leaves for the next is of `dtype` too, sums
    are fp32.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.large: tuple[float, Linear] = (math.inf, self.run)
        self.scratch_width = 0
        self.products: list[Product] = []
        self.kept: list[torch.Tensor | None] = []  # what the products point to

    def scratch(self, columns: int) -> Place:
        """Columns that nobody else uses, from the beginning of a cache line on."""
        place = Place(SCRATCH, self.scratch_width)
        self.scratch_width += -(-columns // TILE_ROWS) * TILE_ROWS
        return place

    def add(self, stage: int, weight: Weight, x: Place, y: Place, addend: Place = NOWHERE) -> None:
        """y = x weight^T + addend. Memory is kept for the packed weight, not for the one given."""
        packed = pack(weight.values)
        scale = None if weight.scale is None else weight.scale.float().contiguous()
        n, k = weight.values.shape
        kind = WEIGHTS.index(weight.values.dtype)
        pointers = (packed.data_ptr(), None if scale is None else scale.data_ptr())
        # ctypes keeps addresses, not tensors: what they point to has to live as long as the chain.
        self.products.append(Product(stage, kind, k, n, *x, *y, *addend, *pointers))
        self.kept += [packed, scale]

    def add_silu(self, stage: int, columns: int, x: Place, y: Place, factor: Place) -> None:
        """y = silu(x) * factor, of so many columns; y may be x."""
        self.products.append(Product(stage, SILU, 0, columns, *x, *y, *factor, None, None))

    def finish(self, large: tuple[float, Linear] | None = None) -> Linear:
        """The callable, once all products are in; `large`: from how many tokens on another way is taken, and
        which. Under torch.compile it is a torch operator, which leaves it
        whole; otherwise the way through torch's dispatcher would cost as much as a small product.
        """
        self.large = large or self.large
        # product.c takes neighbours of one number for a stage, and stages in the order in which they come.
        self.products.sort(key=lambda product: product.stage)
        array = (Product * len(self.products))(*self.products)
        # Rows of a power of two of bytes would fall on the same lines of a cache.
        width = self.scratch_width = self.scratch_width + TILE_ROWS
        widths = (ctypes.c_int64 * 3)(self.in_features, self.out_features, width)
        self.chain = ProductChain(array, len(array), int(self.dtype is torch.bfloat16), widths)
        self.address = ctypes.addressof(self.chain)
        self.function = load_products()
        assert self.function is not None
        _keep_freed_memory()
        # For good: a compiled graph knows its chain by the place in this list.
        _CHAINS.append(self)
        # A tensor, not a number: a number would be baked into compiled graphs and keep them from being
        # shared.
        handle = torch.tensor(len(_CHAINS) - 1, dtype=torch.int64)
        out_features = self.out_features

        def call(x: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling():
                return torch.ops.neuronmlp.chain(x, handle, out_features)
            return self.run(x)

        return call

    def run(self, x: torch.Tensor) -> torch.Tensor:
        assert self.function is not None
        if x.dtype is not self.dtype:
            return self.run(x.to(self.dtype)).to(x.dtype)
        tokens = x.numel() // self.in_features
        if tokens >= self.large[0]:
            return self.large[1](x)
        rows = x if x.is_contiguous() else x.contiguous()
        output = x.new_empty((*x.shape[:-1], self.out_features))
        if tokens:
            scratch = _scratch(tokens * self.scratch_width * x.element_size())
            self.function(self.address, rows.data_ptr(), output.data_ptr(), scratch, tokens)
        return output


@functools.cache
def _keep_freed_memory() -> None:
    """Have glibc keep blocks of some MiB that are freed. It gives those above a threshold back to the system,
    so that the pages of the next one are faulted in anew, and raises the threshold to the largest block that
    it saw freed. vLLM's dense MLP frees such blocks, a chain does not, and all other layers would pay.
    """
    torch.empty(24 << 20, dtype=torch.uint8)  # freed at once; no page of it is ever touched


_MEMORY = threading.local()


def _scratch(bytes_needed: int) -> int:
    """Address of memory that this thread's chains share: its pages are there once, and not for every call
    anew, and are large ones where the system has them, since every row lies on another of the small ones.
    """
    memory: mmap.mmap | None = getattr(_MEMORY, "bytes", None)
    if memory is None or len(memory) < bytes_needed:
        whole = -(-bytes_needed // LARGE_PAGE) * LARGE_PAGE
        memory = _MEMORY.bytes = mmap.mmap(-1, whole, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        _MEMORY.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    address: int = _MEMORY.address
    return address


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
