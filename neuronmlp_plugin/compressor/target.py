"""The largest removal whose quality on the judge's windows meets a target: bisection over sizes, every probe
written down.

A probe chooses ranks and runs the dense model with the truncated matrices W' in it: a form stores the same
matrix, so no pivots are needed to judge it. What rounding to the stored dtype adds is judged on the finished
tensors, which have the last word.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neuronmlp_plugin.checkpoint.files import read_object
from neuronmlp_plugin.checkpoint.writer import save_json
from neuronmlp_plugin.compressor.settings import Target
from neuronmlp_plugin.errors import CheckpointError, UsageError

# A finer step than allocation's own tolerance (0.5 % of the parameters) would probe the same ranks twice.
STEP = 0.005
SIZES = tuple(round(STEP * notch, 3) for notch in range(1, 191))


def largest(sizes: Sequence[float], meets: Callable[[float], bool]) -> float | None:
    """The last of the rising `sizes` that meets, by bisection, so as if all before one that meets do; None
    where the first does not.
    """
    low, high = -1, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(sizes[middle]) else (low, middle)
    return sizes[low] if low >= 0 else None


class Search:
    """Probes of one target, kept in the file `path` so that none is made twice.

    A probe is a removed share, whether the tensors were judged as `stored` or truncated only, whether it met,
    and its quality.
    """

    def __init__(self, path: pathlib.Path, asked: str, target: Target) -> None:
        self.path, self.asked, self.target = path, asked, target
        self.probes: list[dict[str, Any]] = []
        with contextlib.suppress(CheckpointError):  # not there yet, or damaged: probes are made again
            self.probes = read_object(path)["probes"]

    def known(self, removed: float, *, stored: bool) -> bool | None:
        """Whether that probe met; None where it was not made."""
        return next(
            (
                probe["met"]
                for probe in self.probes
                if (probe["removed"], probe["stored"]) == (removed, stored)
            ),
            None,
        )

    def record(self, removed: float, quality: Mapping[str, float], *, stored: bool) -> bool:
        """Write a probe down; returns whether it met."""
        met = self.target.met(quality)
        if self.known(removed, stored=stored) is None:
            self.probes.append({"removed": removed, "stored": stored, "met": met, **quality})
            save_json(self.path, {"probes": self.probes})
        return met

    def candidate(self, sizes: Sequence[float], measure: Callable[[float], Mapping[str, float]]) -> float:
        """The size to build next: the largest that meets when truncated, then one step less for every time
        its stored tensors did not.

        Raises UsageError where no size is left.
        """

        def meets(removed: float) -> bool:
            known = self.known(removed, stored=False)
            return self.record(removed, measure(removed), stored=False) if known is None else known

        best = largest(sizes, meets)
        # Only a failure rules a size out: one that was not built yet (None) is still to be tried.
        left = [
            size
            for size in sizes
            if best is not None and size <= best and self.known(size, stored=True) is not False
        ]
        if not left:
            found = min(self.probes, key=lambda probe: probe["removed"])
            raise UsageError(
                f"--target {self.asked}: expected a removal that meets it, found {self.target.metric} "
                f"{found[self.target.metric]:.4f} "
                f"at {found['removed']:.1%} already; ask for less."
            )
        return left[-1]

    def to_json(self) -> dict[str, Any]:
        """For the report: what was asked and every probe, smallest removal first."""
        probes = sorted(self.probes, key=lambda probe: (probe["removed"], probe["stored"]))
        return {
            "asked": self.asked,
            "metric": self.target.metric,
            "bound": self.target.bound,
            "probes": probes,
        }
