"""Small kernels whose cost can be worked out by hand."""

import ml_dtypes
import numpy as np

from nki_kernels.backend import nisa, nl
from nki_kernels.cost.constants import DOCUMENTED
from nki_kernels.cost.estimate import schedule
from nki_kernels.simulator import Placeholder

BF16 = np.dtype(ml_dtypes.bfloat16)
TILE = (128, 512)


def array(*shape, dtype=BF16):
    return Placeholder(shape, dtype)


def slots_of(kernel, *arguments, constants=DOCUMENTED):
    """The timeline, in program order."""
    return schedule(kernel, arguments, constants=constants)[0].slots


def tile(buffer=nl.sbuf, dtype=nl.bfloat16, cols=512):
    return nl.ndarray((128, cols), dtype=dtype, buffer=buffer)


def matmuls(a, b, count=4):
    """Loads both operands, multiplies `count` times into one bank, evicts and stores."""
    out = nl.ndarray(TILE, dtype=a.dtype, buffer=nl.shared_hbm)
    left, right, result, total = tile(cols=128), tile(), tile(), tile(nl.psum, nl.float32)
    nisa.dma_copy(dst=left, src=a)
    nisa.dma_copy(dst=right, src=b)
    for i in range(count):
        nisa.nc_matmul(total, left, right, accumulate=i > 0)
    nisa.activation(dst=result, op=nl.copy, data=total)
    nisa.dma_copy(dst=out, src=result)
    return out


def copies(src, buffers, rounds=8):
    """Streams `rounds` tiles through `buffers` rotating ones, doubling each in place of work."""
    out = nl.ndarray((rounds * 128, 512), dtype=src.dtype, buffer=nl.shared_hbm)
    ring = []
    for _ in range(buffers):
        ring.append(tile())
    for i in range(rounds):
        held = ring[i % buffers]
        nisa.dma_copy(dst=held, src=src[i * 128 : i * 128 + 128, :])
        nisa.tensor_tensor(dst=held, data1=held, data2=held, op=nl.add)
        nisa.dma_copy(dst=out[i * 128 : i * 128 + 128, :], src=held)
    return out


def fresh_tiles(src, rounds=8):
    """As `copies`, each round in a tile of its own that is let go afterwards."""
    out = nl.ndarray((rounds * 128, 512), dtype=src.dtype, buffer=nl.shared_hbm)
    for i in range(rounds):
        held = tile()
        nisa.dma_copy(dst=held, src=src[i * 128 : i * 128 + 128, :])
        nisa.dma_copy(dst=out[i * 128 : i * 128 + 128, :], src=held)
    return out
