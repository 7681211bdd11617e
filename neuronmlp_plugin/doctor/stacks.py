"""Which versions belong together, by Neuron SDK. Source: the SDK's release notes (component versions), read
November 2026.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stack:
    """One SDK's set. `kernels`: whether our NKI kernels run there on a trn1 (NeuronCore-v2), as the vendor
    supports it.
    """

    sdk: str
    nxdi: tuple[int, int]
    vllm: tuple[tuple[int, int], ...]
    vllm_neuron: tuple[tuple[int, int], ...]
    nki: tuple[int, int] | None
    kernels: bool
    remark: str


STACKS = (
    Stack(
        "2.26",
        (0, 6),
        ((0, 11),),
        ((0, 2),),
        None,
        False,
        "only the older `neuronxcc.nki`: low-rank MLPs run by torch operations",
    ),
    Stack(
        "2.27",
        (0, 7),
        ((0, 11),),
        ((0, 2), (0, 3)),
        (0, 1),
        False,
        "the kernels need nki 0.2: low-rank MLPs run by torch operations",
    ),
    Stack("2.28", (0, 8), ((0, 13),), ((0, 4),), (0, 2), True, "the reference stack on trn1"),
    Stack(
        "2.29",
        (0, 9),
        ((0, 16), (0, 13)),
        ((0, 5),),
        (0, 3),
        False,
        "the vendor supports NKI kernels on trn2 and later only",
    ),
    Stack(
        "2.30",
        (0, 10),
        ((0, 16),),
        ((0, 5),),
        (0, 4),
        False,
        "the vendor supports NKI kernels on trn2 and later only",
    ),
    Stack("2.31", (0, 10), ((0, 16),), ((0, 5),), (0, 5), False, "the last stack with NxD Inference"),
)
REFERENCE = next(stack for stack in STACKS if stack.sdk == "2.28")


def stack_of(nxdi: tuple[int, ...], nki: tuple[int, ...] | None) -> Stack | None:
    """The SDK that an installed NxDI belongs to; where two SDKs ship the same one, nki decides."""
    candidates = [stack for stack in STACKS if stack.nxdi == nxdi[:2]]
    exact = [stack for stack in candidates if nki is not None and stack.nki == nki[:2]]
    return next(iter(exact or candidates), None)
