"""Which versions belong together on a trn1, by Neuron SDK, and which nki the kernels are read by.

Versions: the vendor's manifest (aws-neuron-sdk, src/helperscripts/n2-manifest.json at v2.32.0, entries whose
`supported_instances` has trn1) and its release content page of 2.33.0; vLLM and vllm-neuron: the vLLM user
guide of each tag, and the overview of inference libraries at v2.32.0. docs/trainium.md has the table.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stack:
    """One SDK's set on trn1: exact versions by distribution, as prefixes; absent what it does not ship.

    `kernels`: whether the vendor supports NKI kernels on a trn1 there; `remark`: why not, or what else.
    """

    sdk: str
    versions: dict[str, str]
    kernels: bool
    remark: str

    @property
    def serves(self) -> bool:
        """Whether it has NxD Inference, and so models to put our MLPs into."""
        return "neuronx-distributed-inference" in self.versions

    def matches(self, distribution: str, version: str) -> bool:
        """Whether an installed version is the one of this stack ("0.8.16251+abc" is "0.8.16251")."""
        wanted = self.versions.get(distribution)
        return wanted is None or f"{version.partition('+')[0]}.".startswith(f"{wanted}.")


def _stack(sdk: str, words: str, kernels: bool, remark: str) -> Stack:
    """`words`: versions of NxDI, NxD, neuronx-cc, torch-neuronx, nki, vLLM and vllm-neuron; "-" is none."""
    names = (
        "neuronx-distributed-inference",
        "neuronx-distributed",
        "neuronx-cc",
        "torch-neuronx",
        "nki",
        "vllm",
        "vllm-neuron",
    )
    found = dict(zip(names, words.split(), strict=True))
    return Stack(sdk, {name: version for name, version in found.items() if version != "-"}, kernels, remark)


_NO_NKI = "the vendor supports NKI kernels on trn2 and later only (NxD Inference notes of 2.29)"
STACKS = (
    _stack(
        "2.26.1",
        "0.6.10598 0.15.22404 2.21.33363 2.8.0.2.10.16998 - 0.11 0.2",
        False,
        "only the older `neuronxcc.nki`: low-rank MLPs run by torch operations",
    ),
    _stack(
        "2.27.1",
        "0.7.15063 0.16.25997 2.22.12471 2.9.0.2.11.19912 0.1 0.11 0.2",
        False,
        "the kernels need nki 0.2: low-rank MLPs run by torch operations",
    ),
    _stack(
        "2.28.1",
        "0.8.16251 0.17.26814 2.23.6484 2.9.0.2.12 0.2.0 0.13 0.4",
        True,
        "the reference stack on trn1",
    ),
    _stack("2.29.1", "0.9.17334 0.18.27753 2.24 2.9.0.2.13 0.3.0 0.16 0.5", False, _NO_NKI),
    _stack("2.30.0", "0.10.17970 0.19.28093 2.25.3371 2.9.0.2.14.27725 0.4.0 0.16 0.5", False, _NO_NKI),
    _stack(
        "2.31.1",
        "0.10.18399 0.19.28492 2.26.6360 2.9.0.2.15.32035 0.5.0 0.16 0.5",
        False,
        f"{_NO_NKI}; the last with NxD Inference, which stays in maintenance there on trn1",
    ),
    _stack("2.32.0", "- - 2.27.5334 - 0.6.0 - -", False, "no NxD Inference: nothing to serve with on trn1"),
    _stack(
        "2.33.0",
        "- - 2.28.7631 2.9.0.2.15.32035 0.7.0 - -",
        False,
        "no NxD Inference: nothing to serve with on trn1; kernels alone are traced by Python",
    ),
)
REFERENCE = next(stack for stack in STACKS if stack.sdk == "2.28.1")
# What tells one SDK from another, the most telling first.
_TELLING = ("neuronx-distributed-inference", "nki", "neuronx-cc")


def stack_of(versions: dict[str, str]) -> Stack | None:
    """The SDK that the installed distributions belong to: as many of the telling ones as match, the first of
    them weighing most; None where none matches to its minor version.
    """

    def score(stack: Stack) -> tuple[int, ...]:
        exact = [
            name in stack.versions and name in versions and stack.matches(name, versions[name])
            for name in _TELLING
        ]
        minor = [
            name in versions and _minor(versions[name]) == _minor(stack.versions.get(name))
            for name in _TELLING
        ]
        # Compared as tuples: a less telling distribution decides only among stacks that the others leave
        # equal.
        return tuple(2 * e + m for e, m in zip(exact, minor, strict=True))

    best = max(STACKS, key=score)
    return best if any(score(best)) else None


def nki_of(versions: dict[str, str]) -> str:
    """The nki ("0.2") whose compiler will read the kernels here: the installed one, else that of the stack
    that is found, else the reference's.
    """
    installed = versions.get("nki") or (stack_of(versions) or REFERENCE).versions.get("nki")
    return ".".join((installed or REFERENCE.versions["nki"]).split(".")[:2])


def _minor(version: str | None) -> tuple[str, ...] | None:
    return None if version is None else tuple(version.split(".")[:2])
