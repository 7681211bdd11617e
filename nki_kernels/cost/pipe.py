"""All DMA queues together, as one pipe that is shared in program order and never idle while someone is
ready.
"""

from __future__ import annotations

GAPS_KEPT = 64  # older idle times are forgotten: nothing becomes ready that long after the fact


class Pipe:
    """Reserves time of the pipe. Earlier callers go first; what they leave idle, waiting for data, later ones
    may fill.
    """

    def __init__(self) -> None:
        self._gaps: list[tuple[float, float]] = []
        self._tail = 0.0
        self.busy_ns = 0.0

    def reserve(self, ready_ns: float, need_ns: float) -> float:
        """When a transfer that is ready at `ready_ns` and needs `need_ns` of the whole pipe ends."""
        self.busy_ns += need_ns
        # Gaps are in order of time: where the last one is over by then, all are.
        if self._gaps and self._gaps[-1][1] > ready_ns:
            need_ns, end = self._fill_gaps(ready_ns, need_ns)
            if need_ns <= 0:
                return end
        start = max(ready_ns, self._tail)
        if start > self._tail:
            self._gaps.append((self._tail, start))
            del self._gaps[:-GAPS_KEPT]
        self._tail = start + need_ns
        return self._tail

    def _fill_gaps(self, ready_ns: float, need_ns: float) -> tuple[float, float]:
        """(what is still needed, when the part that fits ends)."""
        end, kept = ready_ns, []
        for first, last in self._gaps:
            # A transfer is many descriptors, so it may fall into several gaps.
            start = max(first, ready_ns)
            if need_ns <= 0 or last <= start:
                kept.append((first, last))
                continue
            fits = need_ns <= last - start
            end = start + need_ns if fits else last
            # What fits is never subtracted: rounding would leave a trace of it.
            need_ns = 0.0 if fits else need_ns - (last - start)
            kept += [gap for gap in ((first, start), (end, last)) if gap[1] > gap[0]]
        self._gaps = kept
        return need_ns, end
