"""Which path each layer takes in each phase, why, and how often it ran: so that a fallback cannot pass for a
kernel run.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.serving.trainium.options import Options

PREFILL, DECODE = "prefill", "decode"
PHASES = (PREFILL, DECODE)


@dataclasses.dataclass(frozen=True)
class Decision:
    """`kernel` or `torch`, and one sentence saying why."""

    path: str
    reason: str


def decide(
    options: Options, unavailable: str | None, declined: str | None, layer: int
) -> dict[str, Decision]:
    """Phase -> decision for one layer.

    `unavailable`: why no kernel can run here at all; `declined`: why the planner has no plan for this layer.
    Raises UsageError where the user requires kernels and there are none.
    """
    why_not = unavailable or declined
    if options.kernels == "require" and why_not:
        raise UsageError(
            f"layer {layer}: expected a kernel (kernels: require), found none: {why_not}; use kernels: auto to fall back."
        )
    decisions = {}
    for phase in PHASES:
        if options.kernels in ("off", *(other for other in PHASES if other != phase)):
            decisions[phase] = Decision("torch", f"kernels: {options.kernels}")
        elif why_not:
            decisions[phase] = Decision("torch", why_not)
        else:
            decisions[phase] = Decision("kernel", "planned")
    return decisions


class DispatchRecord:
    """What was traced (layer, phase, tokens -> decision) and how often a layer ran by each path."""

    def __init__(self) -> None:
        self.traced: dict[tuple[int, str, int], Decision] = {}
        self.runs: collections.Counter[tuple[str, Decision]] = collections.Counter()
        self.told: set[str] | None = None

    def add(self, layer: int, phase: str, tokens: int, decision: Decision) -> None:
        """A layer was traced (or, on a CPU, run) for so many tokens."""
        self.traced[layer, phase, tokens] = decision

    def ran(self, phase: str, tokens: int) -> None:
        """One forward of the model; NxDI pads it to the smallest traced token count that holds it."""
        sizes = {size for _, traced_phase, size in self.traced if traced_phase == phase}
        padded = min((size for size in sizes if size >= tokens), default=max(sizes, default=0))
        for (_, traced_phase, size), decision in self.traced.items():
            if traced_phase == phase and size == padded:
                self.runs[phase, decision] += 1

    def layers(self) -> Iterator[tuple[str, Decision, int]]:
        """(phase, decision, number of layers) of all that was traced."""
        counted = {(layer, phase, decision) for (layer, phase, _), decision in self.traced.items()}
        totals = collections.Counter((phase, decision) for _, phase, decision in counted)
        for (phase, decision), n in sorted(
            totals.items(), key=lambda item: (item[0][0], item[0][1].path, item[0][1].reason)
        ):
            yield phase, decision, n

    def summary(self) -> str:
        """One line per phase and path."""
        lines = [
            f"{phase}: {n} layers by {decision.path} ({decision.reason})"
            for phase, decision, n in self.layers()
        ]
        return "neuronmlp: " + ("; ".join(lines) or "no layer was traced")

    def news(self) -> str | None:
        """The summary, at the first call and whenever another phase was traced since; else None."""
        phases = {phase for _, phase, _ in self.traced}
        if self.told is not None and phases <= self.told:
            return None
        self.told = phases
        return self.summary()

    def totals(self) -> dict[str, list[list[Any]]]:
        """Counts by [phase, path, reason], as JSON for other processes: how many layers, and how many runs of
        one layer.
        """
        return {
            "layers": [[phase, *dataclasses.astuple(decision), n] for phase, decision, n in self.layers()],
            "runs": [
                [phase, *dataclasses.astuple(decision), n] for (phase, decision), n in self.runs.items()
            ],
        }

    def save(self, path: str) -> None:
        """Write what was traced beside a compiled artifact."""
        with open(path, "w", encoding="utf-8") as handle:
            json.dump(
                [[*key, *dataclasses.astuple(decision)] for key, decision in self.traced.items()], handle
            )

    def restore(self, path: str) -> None:
        """Read it back where nothing is traced, because the artifact is loaded.

        An artifact without the file was not compiled by us and says nothing of its kernels: raises
        UsageError.
        """
        try:
            with open(path, encoding="utf-8") as handle:
                entries = json.load(handle)
        except FileNotFoundError as error:
            raise UsageError(
                f"{path}: expected the record of which kernels the artifact holds, found none; "
                "compile the model again into an empty folder."
            ) from error
        for layer, phase, tokens, decided, reason in entries:
            self.add(layer, phase, tokens, Decision(decided, reason))


RECORD = DispatchRecord()
FILE = "neuronmlp_dispatch.json"
