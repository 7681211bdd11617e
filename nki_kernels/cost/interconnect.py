"""Collectives between the cores of one instance, as formulas. Two documented sets of latencies: bytes on the
wire cost the same under both.

ring   [runtime] "per-hop latency of Ring/KangaRing is about 1-2 us", (n - 1) hops for an all-gather or a
       reduce-scatter of n cores, twice that for an all-reduce. The runtime calls it its fallback.
mesh   [runtime] O(1) latency below 1 MB, above it recursive doubling in log2(n) hops. One step takes the
       shortest time that nccom-test's guide prints for 8 cores (all-gather of 1 KiB: 10.0 us; 6.2 us for 32
       cores), at any number of cores; a small all-reduce is one such step, in which every core sends its
       whole buffer to all others ("single-step mesh").

[runtime] neuron-runtime/explore/intranode-collective-comm, [nccom] tools/neuron-sys-tools/nccom-test, both of
the Neuron documentation, SDK 2.32. The guide prints 58 to 300 us elsewhere, by older versions of the tool,
for sizes where nothing but the launch can take that long; we take the shortest.
"""

from __future__ import annotations

import dataclasses
import math

from nki_kernels.targets import TRN1, Target

LINK_GBPS = {"trn1": 384.0, "trn2": 1280.0, "trn3": 2560.0}  # per chip, NeuronLink [arch]
HOP_US = 1.5  # one step of a ring inside an instance, 1 to 2 us [runtime]
MESH_US = 10.0  # a step of the mesh [nccom]
MESH_BYTES = 1 << 20  # "sweet range" of the mesh [runtime]


@dataclasses.dataclass(frozen=True)
class Collectives:
    """One set of latencies; a table names the set that it was made with."""

    name: str

    def gather_us(self, size_bytes: float, cores: int, target: Target = TRN1) -> float:
        """All-gather to, or reduce-scatter of, `size_bytes` over `cores`."""
        if cores == 1:
            return 0.0
        return self._step_us(size_bytes, cores) + _wire_us(size_bytes * (cores - 1) / cores, target)

    def all_reduce_us(self, size_bytes: float, cores: int, target: Target = TRN1) -> float:
        """A reduce-scatter and an all-gather or, for small messages on a mesh, one exchange of everything."""
        both = 2 * self.gather_us(size_bytes, cores, target)
        if self.name == "ring" or cores == 1 or size_bytes > MESH_BYTES:
            return both
        return min(both, MESH_US + _wire_us(size_bytes * (cores - 1), target))

    def _step_us(self, size_bytes: float, cores: int) -> float:
        if self.name == "ring":
            return (cores - 1) * HOP_US
        return MESH_US if size_bytes <= MESH_BYTES else max(MESH_US, math.log2(cores) * HOP_US)


def _wire_us(size_bytes: float, target: Target) -> float:
    """Bytes over a core's share of its chip's link."""
    return size_bytes * target.cores_per_chip / LINK_GBPS[target.name] / 1000


RING, MESH = Collectives("ring"), Collectives("mesh")
COLLECTIVES = {found.name: found for found in (RING, MESH)}
