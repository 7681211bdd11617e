"""What the compilers of the `nki` versions read: a table, as `simulator.signatures` is one of their calls.

From 0.2 to 0.6 a kernel is not run as Python: its source is gathered, checked and evaluated by a language of
its own. From 0.7 on Python itself is traced: the rules of syntax fall away, those on views and names stay.
Sources: the release notes and migration guides of the SDKs 2.27 to 2.33, and KLR (leanprover/KLR at 7ccd18c)
for what the compiler reads.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Version:
    """One release of nki. `reads_source`: a front end of its own reads kernels; otherwise Python is traced.
    `since_3`: what came with 0.3: no lists as kernel arguments, no keyword-only parameters of kernels, and
    users' reports of helpers whose defaults are dropped.
    """

    name: str
    sdk: str
    reads_source: bool
    since_3: bool
    signatures: str  # the table of simulator.signatures that its calls are held to


VERSIONS = {
    version.name: version
    for version in (
        Version("0.2", "2.28", True, False, "0.2"),
        Version("0.3", "2.29", True, True, "0.6"),
        Version("0.4", "2.30", True, True, "0.6"),
        Version("0.5", "2.31", True, True, "0.6"),
        Version("0.6", "2.32", True, True, "0.6"),
        Version("0.7", "2.33", False, True, "0.6"),
    )
}
REFERENCE = "0.2"  # the last that the vendor documents for trn1


def read_as(installed: str) -> str:
    """The row whose rules stand for an installed nki that cannot be asked: its own, the last that reads
    source where Python is traced, and the reference's where the table has none.
    """
    short = ".".join(installed.split(".")[:2])
    if short not in VERSIONS:
        return REFERENCE
    return (
        short if VERSIONS[short].reads_source else [v.name for v in VERSIONS.values() if v.reads_source][-1]
    )


class UnknownVersionError(ValueError):
    """A version of nki that is not in the table."""


def version_of(name: str) -> Version:
    """The row of nki `name`, which may have a patch level: "0.2.0" is "0.2"."""
    short = ".".join(name.split(".")[:2])
    if short not in VERSIONS:
        raise UnknownVersionError(
            f"target: expected a version of nki, one of {', '.join(VERSIONS)}, found {name!r}; "
            "look up the version that your SDK ships in docs/trainium.md."
        )
    return VERSIONS[short]
