"""What the front end says: a refusal with its stage, the compiler's words, the place, and what to write
instead.
"""

from __future__ import annotations

import dataclasses

# Stages, in the order in which the compiler runs them: it collects source, checks its syntax, evaluates it.
GATHER, SYNTAX, TRACE = "G", "S", "T"
NAMES = {GATHER: "gathering", SYNTAX: "syntax", TRACE: "evaluation"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One thing that the compiler does not take.

    `message` is the compiler's own sentence, with {found} for the part that names something. `instead` says
    what to write. `warns`: accepted, but with another meaning than in Python, or on some versions only.
    """

    stage: str
    message: str
    instead: str
    warns: bool = False


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A rule broken at a place: `file` as Python names it, `line` from 1 (0 where there is none)."""

    rule: str
    stage: str
    message: str
    instead: str
    file: str
    line: int
    warns: bool = False

    def __str__(self) -> str:
        severity = "warning" if self.warns else "refused"
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {severity} in {NAMES[self.stage]} [{self.stage}]: {self.message}; {self.instead}"


class RefusedError(AssertionError):
    """The compiler would refuse this kernel; `refusals` says where and why."""

    def __init__(self, kernel: str, refusals: tuple[Refusal, ...]) -> None:
        self.refusals = refusals
        count = "one place" if len(refusals) == 1 else f"{len(refusals)} places"
        lines = "\n  ".join(str(refusal) for refusal in refusals)
        super().__init__(f"{kernel}: the NKI compiler would refuse it in {count}:\n  {lines}")
