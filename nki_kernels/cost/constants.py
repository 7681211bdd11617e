"""Every constant of the cost model that is not a property of the target, with its source; and the sets that predictions are made with.

Clocks and sizes are in `nki_kernels.targets`. Sources: [isa] "Estimated instruction cost" of the nki.isa pages, SDK 2.26.1; [perf] the NKI
performance guide; [dma] the DMA bandwidth guide; [tutorial] the two published latencies of AWS's matmul tutorial; [paper] arXiv
2510.25977, one core, 8192 tokens; [runtime] neuron-runtime's collectives pages.
"""

from __future__ import annotations

import dataclasses

MIN_INTERVAL_CYCLES = 64  # shortest initiation interval of any engine [isa]
GPSIMD_START_CYCLES = 150  # [isa] affine_select, iota
FP32_PASSES = 4  # TensorE passes of an fp32 matmul [isa]
# Dependent one-element ScalarE instructions were seen 264 cycles apart [perf]; 64 of them are the initiation interval.
RESULT_LATENCY_CYCLES = 200
DMA_START_NS = 1300.0  # semaphore to first byte [dma]
DMA_PARTITIONS_PER_ENGINE = 8  # a transfer to P partitions uses P / 8 engines [dma]
OVERHEAD_BOUND_ROW_BYTES = 256  # shorter rows cost as much as one of this length: "severely overhead bound" below it [dma]

HOP_US = 1.5  # one step of a ring inside an instance, 1 to 2 us [runtime]
LINK_GBPS = {"trn1": 384.0, "trn2": 1280.0, "trn3": 2560.0}  # per chip, NeuronLink [arch]


@dataclasses.dataclass(frozen=True)
class Constants:
    """One set of DMA rates; a prediction names the set it was made with.

    A descriptor of `L` contiguous bytes takes an engine min(L / short, setup + L / peak), where `peak` is the target's documented achieved rate
    and `short` the effective rate of short rows; both meet at `long_row_bytes`, which fixes `setup`. Long rows amortise the set-up of a
    descriptor; short ones run at a constant rate, as the two tutorial kernels show with rows of 256 and of 1024 bytes.
    """

    name: str
    short_row_share: float  # short / peak
    long_row_bytes: int  # where rows begin to be long; 0: no row ever is
    source: str
    fitted: int  # how many of the two numbers were fitted to published latencies

    def descriptor_ns(self, row_bytes: int, engine_peak_gbps: float) -> float:
        """Time of one DMA engine for one descriptor, in ns; `engine_peak_gbps` in GB/s, i.e. bytes per ns."""
        row = max(row_bytes, OVERHEAD_BOUND_ROW_BYTES)
        short = row / (engine_peak_gbps * self.short_row_share)
        if not self.long_row_bytes:
            return short
        setup = self.long_row_bytes / engine_peak_gbps * (1 / self.short_row_share - 1)
        return min(short, setup + row / engine_peak_gbps)


DOCUMENTED = Constants("documented", 1.0, 0, "17 B/ns achieved per DMA engine on trn1, at any row length [dma]", fitted=0)
EFFECTIVE = Constants("effective", 104 / 272, 0, "104 GB/s of the two tutorial kernels, at any row length [tutorial]", fitted=1)
CALIBRATED = Constants(
    "calibrated", 104 / 272, 1024, "104 GB/s up to rows of 1 KiB [tutorial]; beyond, towards the documented peak [dma, paper]", fitted=2
)
SETS = {constants.name: constants for constants in (CALIBRATED, DOCUMENTED, EFFECTIVE)}
