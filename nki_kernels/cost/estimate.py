"""The answer: how long a launch takes, what bounds it, and where the time goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nki_kernels.backend import HAS_NKI
from nki_kernels.cost.constants import CALIBRATED, Constants
from nki_kernels.cost.counters import Additive, Counters, Counting
from nki_kernels.cost.schedule import Scheduler, Slot
from nki_kernels.simulator import simulate
from nki_kernels.simulator.trace import DMA, GPSIMD, SCALAR, TENSOR, VECTOR
from nki_kernels.targets import TRN1, Target

NO_COUNTS = Counters()
RESOURCES = (TENSOR, SCALAR, VECTOR, GPSIMD, DMA)  # in the order in which they claim the time of a launch


@dataclasses.dataclass(frozen=True)
class Times(Additive):
    """Time per resource, in us."""

    tensor: float = 0.0
    scalar: float = 0.0
    vector: float = 0.0
    gpsimd: float = 0.0
    dma: float = 0.0
    waiting: float = 0.0  # nothing works: start latencies of transfers, results on their way


@dataclasses.dataclass(frozen=True)
class Estimate(Additive):
    """All simulated, in us. `busy`: how long each resource works (`dma`: all engines together, at the rates
    of the constants).

    `exposed`: every moment of the launch given to the first of TensorE, ScalarE, VectorE, GpSimdE and DMA
    that works then; it sums to `simulated_us`.
    """

    simulated_us: float = 0.0
    busy: Times = Times()
    exposed: Times = Times()
    counters: Counters = NO_COUNTS

    def utilisation(self, resource: str) -> float:
        """Share of the launch that a resource works."""
        return float(getattr(self.busy, resource)) / self.simulated_us if self.simulated_us else 0.0

    @property
    def busiest_us(self) -> float:
        """What the busiest resource works: no schedule can be shorter."""
        return max(getattr(self.busy, resource) for resource in RESOURCES)

    @property
    def bound(self) -> str:
        """The busiest resource, or "dependencies" if none works three quarters of the time."""
        busiest = max(RESOURCES, key=self.utilisation)
        return busiest if self.utilisation(busiest) >= 0.75 else "dependencies"


def _union_ns(intervals: np.ndarray) -> float:
    """Length of the union of `[n, 2]` intervals."""
    if not len(intervals):
        return 0.0
    order = intervals[np.argsort(intervals[:, 0])]
    reach = np.maximum.accumulate(order[:, 1])
    # Nothing works between the latest end so far and a start behind it.
    idle = np.maximum(0.0, order[1:, 0] - reach[:-1]).sum()
    return float(reach[-1] - order[0, 0] - idle)


def _exposed(slots: Sequence[Slot]) -> Times:
    """See `Estimate.exposed`."""
    latency = max((slot.end_ns for slot in slots), default=0.0)
    claimed, covered, found = [], 0.0, {}
    for resource in RESOURCES:
        claimed += [(slot.start_ns, slot.end_ns) for slot in slots if slot.engine == resource]
        union = _union_ns(np.array(claimed))
        # What the union grows by is the time in which none of the resources before this one works.
        found[resource] = (union - covered) / 1000
        covered = union
    return Times(**found, waiting=(latency - covered) / 1000)


def critical_path(slots: Sequence[Slot]) -> list[tuple[int, str, float]]:
    """(instruction, what for, ns) from the start of the launch to its end, without gaps: the durations sum to
    the latency.
    """
    found: list[tuple[int, str, float]] = []
    number = max(range(len(slots)), key=lambda i: slots[i].end_ns, default=-1)
    until = slots[number].end_ns if number >= 0 else 0.0
    while number >= 0:
        slot = slots[number]
        # From the back: the wait of the next instruction for this result, the work, and a transfer's start.
        found.append((number, "result_latency", until - slot.end_ns))
        found.append((number, slot.engine, slot.end_ns - slot.start_ns))
        found.append((number, "dma_start", slot.start_ns - slot.ready_ns))
        number, until = slot.cause, slot.ready_ns
    return [step for step in reversed(found) if step[2] > 0]


def schedule(
    kernel: Callable[..., Any],
    arguments: Sequence[Any],
    target: Target = TRN1,
    constants: Constants = CALIBRATED,
) -> tuple[Scheduler, Counters]:
    """One dry run of `kernel` on placeholders, placed in time and counted. What the simulator refuses is
    refused here too.

    Raises RuntimeError where the vendor's `nki` is in force: its kernels leave no trace.
    """
    if HAS_NKI:
        raise RuntimeError(
            "cost model: expected our simulator, found the vendor's nki; set NKI_KERNELS_BACKEND=simulator."
        )
    counting, scheduler = Counting(), Scheduler(target, constants)
    simulate(kernel, target, (counting, scheduler), dry=True)(*arguments)
    return scheduler, counting.result()


def price(
    kernel: Callable[..., Any],
    arguments: Sequence[Any],
    target: Target = TRN1,
    constants: Constants = CALIBRATED,
) -> Estimate:
    """The estimate of one launch."""
    scheduler, counters = schedule(kernel, arguments, target, constants)
    busy = {engine: ns / 1000 for engine, ns in scheduler.busy_ns.items()}
    latency = max((slot.end_ns for slot in scheduler.slots), default=0.0) / 1000
    return Estimate(
        latency, Times(**busy, dma=scheduler.pipe.busy_ns / 1000), _exposed(scheduler.slots), counters
    )


def extrapolate(run: Callable[[int], Estimate], units: int, sample: int = 3) -> Estimate:
    """`run(units)`, where a run is a prologue, `units` like rounds and an epilogue: the last of `sample`
    rounds stands for the rest.

    Counters are then exact. The latency is as good as the schedule has become periodic by round `sample`: the
    tests hold it to full runs, within 5 % for launches of microseconds and 1 % for those of real models.
    """
    if units <= sample:
        return run(units)
    last = run(sample)
    return last + (last - run(sample - 1)) * (units - sample)
