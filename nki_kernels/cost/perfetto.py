"""A simulated timeline as Chrome trace JSON, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from nki_kernels.cost.schedule import Slot
from nki_kernels.simulator.trace import DMA

ENGINES = ("tensor", "scalar", "vector", "gpsimd")


def _events(slots: Sequence[Slot]) -> Iterator[dict[str, Any]]:
    """One complete event per instruction; transfers that overlap get lanes of their own."""
    lanes: list[float] = []
    for number, slot in enumerate(slots):
        if slot.engine == DMA:
            # The first lane that is free by then, or a new one behind the others.
            lane = next((i for i, free in enumerate(lanes) if free <= slot.start_ns), len(lanes))
            lanes[lane:] = [slot.end_ns, *lanes[lane + 1 :]]
            track = len(ENGINES) + lane
        else:
            track = ENGINES.index(slot.engine)
        start_us, took_us = slot.start_ns / 1000, (slot.end_ns - slot.start_ns) / 1000
        about = {"instruction": number, "waited_for": slot.cause}
        yield {
            "name": slot.op, "cat": slot.engine, "ph": "X", "pid": 0, "tid": track,
            "ts": start_us, "dur": took_us, "args": about,
        }  # fmt: skip


def trace_json(slots: Sequence[Slot], about: str) -> str:
    """The whole timeline; `about` says of which kernel, target and constants."""
    events = list(_events(slots))
    tracks = sorted({event["tid"] for event in events})
    names = [
        ENGINES[track] if track < len(ENGINES) else f"dma lane {track - len(ENGINES)}" for track in tracks
    ]
    named = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": t, "args": {"name": n}}
        for t, n in zip(tracks, names, strict=True)
    ]
    process = {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": f"simulated: {about}"}}
    other = {"origin": "simulated", "about": about}
    return json.dumps(
        {"displayTimeUnit": "ns", "otherData": other, "traceEvents": [process, *named, *events]}
    )
