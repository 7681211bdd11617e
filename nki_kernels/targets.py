"""Hardware numbers of one NeuronCore per chip, each with its source. trn1 first; trn2 and trn3 so that a
kernel can be checked for all.

Sources (AWS Neuron documentation, SDK 2.26 - 2.33): [tile] nki.language.tile_size; [alloc]
nki_direct_allocation_guide (16 KiB of every partition are the compiler's); [nkilib] nki-library's own SBUF
budget; [arch] nki/guides/architecture/trainium*_arch; [dma] the DMA bandwidth guide; [doc] the nki.isa page
of the op; [perf] the NKI performance guide.
"""

from __future__ import annotations

import dataclasses
import math

# Partitions of SBUF and PSUM, and rows and columns of the TensorE array, on every generation [tile].
PMAX = 128
KIB = 1024
# "TensorE instruction turnaround time", MM_INIT_LATENCY on NeuronCore-v2 [perf]. [doc] gives a matmul the
# larger of it and its moving columns; the matmul tutorial's fastest kernel, published at 6.97 ms, takes their
# sum (the larger of the two would make it 6.23).
TURNAROUND_CYCLES = 64
# PSUM, alike on every generation [arch]: banks, and bytes of one bank in each partition.
PSUM_BANKS, PSUM_BANK_BYTES = 8, 2 * KIB

# Contiguous rows that a DMA engine moves: at the achieved rate from 4 KiB on [dma]; at 104 of 272 GB/s up to
# the 1 KiB of the tutorial's slowest kernels, whose published latencies say so.
SHORT_ROW_BYTES, SHORT_ROW_SHARE, LONG_ROW_BYTES = KIB, 104 / 272, 4 * KIB


def row_share(
    row_bytes: int, short: float = SHORT_ROW_SHARE, upto: int = SHORT_ROW_BYTES, above: int = LONG_ROW_BYTES
) -> float:
    """The share of the achieved DMA rate that rows of `row_bytes` reach: `short` up to `upto`, all of it from
    `above` on, a power of their length between.
    """
    if row_bytes <= upto:
        return short
    if row_bytes >= above:
        return 1.0
    return float(short ** (math.log(above / row_bytes) / math.log(above / upto)))


@dataclasses.dataclass(frozen=True)
class Target:
    """What one NeuronCore offers. Sizes in bytes per partition unless the name says otherwise; clocks in GHz;
    rates in GB/s.
    """

    name: str
    generation: int  # NeuronCore version: 2, 3, 4
    sbuf_usable_bytes: int  # [alloc] for v2, [nkilib] for v3; v4 by the same reserve (our inference)
    tensor_ghz: float  # [arch]; on trn1 the published kernel latencies fit 2.8 and not 1.4
    vector_ghz: float  # [arch]
    scalar_ghz: float  # [arch]
    gpsimd_ghz: float  # [arch]
    cores_per_chip: int  # [arch]
    dma_achieved_gbps: float  # [dma] per core, 16 engines
    moving_fmax_fp32: int = 512  # [tile] free size of a moving operand, i.e. of a matmul's fp32 destination
    dma_engines: int = 16  # [arch] per core
    stationary_fmax: int = 128  # [tile]
    psum_banks: int = PSUM_BANKS
    psum_bank_bytes: int = PSUM_BANK_BYTES
    matmul_dst_dtypes: tuple[str, ...] = ("float32",)  # [doc] nc_matmul


TRN1 = Target(
    "trn1",
    2,
    176 * KIB,
    tensor_ghz=2.8,
    vector_ghz=1.12,
    scalar_ghz=1.4,
    gpsimd_ghz=1.4,
    cores_per_chip=2,
    dma_achieved_gbps=272,
)
TRN2 = Target(
    "trn2",
    3,
    208 * KIB - 264,
    tensor_ghz=2.4,
    vector_ghz=0.96,
    scalar_ghz=1.2,
    gpsimd_ghz=1.2,
    cores_per_chip=8,
    dma_achieved_gbps=368,
)
TRN3 = Target(
    "trn3",
    4,
    240 * KIB - 264,
    tensor_ghz=2.4,
    vector_ghz=1.2,
    scalar_ghz=1.2,
    gpsimd_ghz=1.2,
    cores_per_chip=8,
    dma_achieved_gbps=528,
    moving_fmax_fp32=4096,
    matmul_dst_dtypes=("float32", "bfloat16"),
)

TARGETS = {target.name: target for target in (TRN1, TRN2, TRN3)}
