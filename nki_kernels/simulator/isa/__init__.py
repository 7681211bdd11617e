"""The instructions of `nki.isa` that are modelled, with the checks of the vendor's simulator and of the
hardware.

Signatures are those of NKI 0.6; `simulate(..., api="0.2")` holds every call to the older ones (see
`signatures.py`). What the real op offers beyond the arguments modelled here is refused, not ignored.
"""

from nki_kernels.simulator.isa.dma import dma_copy, dma_transpose
from nki_kernels.simulator.isa.elementwise import (
    activation,
    memset,
    scalar_tensor_tensor,
    tensor_copy,
    tensor_reduce,
    tensor_scalar,
    tensor_tensor,
)
from nki_kernels.simulator.isa.tensor_engine import nc_matmul, nc_transpose
from nki_kernels.simulator.signatures import (
    dge_mode,
    engine,
    get_nc_version,
    matmul_perf_mode,
    nc_version,
    oob_mode,
    reduce_cmd,
)

__all__ = [
    "activation",
    "dge_mode",
    "dma_copy",
    "dma_transpose",
    "engine",
    "get_nc_version",
    "matmul_perf_mode",
    "memset",
    "nc_matmul",
    "nc_transpose",
    "nc_version",
    "oob_mode",
    "reduce_cmd",
    "scalar_tensor_tensor",
    "tensor_copy",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_tensor",
]
