"""Every constant of the cost model that is not a property of the target, with its source; and the sets that
predictions are made with.

Clocks and sizes are in `nki_kernels.targets`. Sources: [isa] "Estimated instruction cost" of the nki.isa
pages, SDK 2.26.1; [perf] the NKI performance guide; [dma] the DMA bandwidth guide; [tutorial] the two
published latencies of AWS's matmul tutorial.
"""

from __future__ import annotations

import dataclasses

from nki_kernels.targets import LONG_ROW_BYTES, SHORT_ROW_BYTES, SHORT_ROW_SHARE, row_share

MIN_INTERVAL_CYCLES = 64  # shortest initiation interval of any engine [isa]
GPSIMD_START_CYCLES = 150  # [isa] affine_select, iota
FP32_PASSES = 4  # TensorE passes of an fp32 matmul [isa]
# Dependent one-element ScalarE instructions were seen 264 cycles apart [perf]; 64 of them are the initiation
# interval.
RESULT_LATENCY_CYCLES = 200
DMA_START_NS = 1300.0  # semaphore to first byte [dma]
DMA_PARTITIONS_PER_ENGINE = 8  # an engine serves 8 partitions of a transfer [dma]
# Shorter rows cost as much as one of this length: "severely overhead bound" below it [dma].
OVERHEAD_BOUND_ROW_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Constants:
    """One set of DMA rates, and of how long casts take; a prediction names the set it was made with.

    A DMA engine moves contiguous rows of up to `short_row_bytes` at `short_share` of the target's documented
    achieved rate, rows of `long_row_bytes` and more at that rate, and rows between at a rate that rises as a
    power of their length. Rows below OVERHEAD_BOUND_ROW_BYTES take as long as one of that length.
    """

    name: str
    short_share: float
    short_row_bytes: int
    long_row_bytes: int
    source: str
    fitted: int  # how many of the three numbers were fitted to published latencies
    # What reads int8 takes so many times what is documented, to see how much hangs on it.
    cast_factor: float = 1.0

    def descriptor_ns(self, row_bytes: int, engine_gbps: float) -> float:
        """Time of one DMA engine for one contiguous row, in ns; `engine_gbps` is the documented achieved
        rate, in GB/s = bytes per ns.
        """
        row = max(row_bytes, OVERHEAD_BOUND_ROW_BYTES)
        share = row_share(row, self.short_share, self.short_row_bytes, self.long_row_bytes)
        return row / (engine_gbps * share)


EVERY_ROW = 1 << 30  # longer than any row
DOCUMENTED = Constants(
    "documented", 1.0, 0, 0, "17 B/ns achieved per DMA engine on trn1 [dma], for rows of any length", fitted=0
)
EFFECTIVE = Constants(
    "effective", 104 / 272, EVERY_ROW, EVERY_ROW, "104 GB/s [tutorial], for rows of any length", fitted=1
)
CALIBRATED = Constants(
    "calibrated",
    SHORT_ROW_SHARE,
    SHORT_ROW_BYTES,
    LONG_ROW_BYTES,
    "104 GB/s up to the tutorial's rows of 1 KiB, the documented rate from 4 KiB [dma]",
    fitted=2,
)
SETS = {constants.name: constants for constants in (CALIBRATED, DOCUMENTED, EFFECTIVE)}
# Not among the sets that can be asked for: no source says that casts are slow.
SLOW_CASTS = dataclasses.replace(CALIBRATED, name="calibrated, casts 1.5 times as long", cast_factor=1.5)
