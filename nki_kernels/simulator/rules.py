"""How the simulator refuses: one exception, one sentence. Where the vendor's own wording is known it is
kept.

And the rules of the language that only a running kernel shows: views of views, names of tensors, sizes. They
hold before nki 0.7 and after, and are held where a run keeps the language (`Machine.language`).
"""

from __future__ import annotations

import sys
from typing import NoReturn

from nki_kernels.frontend.catalogue import RefusedError, refusal


class NkiValidationError(AssertionError):
    """The hardware or its compiler would refuse this. An AssertionError, as most of the vendor's checks
    are.
    """


class CapacityError(NkiValidationError):
    """More live on-chip memory than there is; the message lists who holds what."""


class UninitializedError(NkiValidationError):
    """An instruction reads memory that nothing has written."""


def require(condition: bool, message: str) -> None:
    """Raise NkiValidationError(message) unless `condition` holds.

    Where it would run several times per instruction, write `if not ...: refuse(...)`: building the message
    costs more than the check.
    """
    if not condition:
        raise NkiValidationError(message)


def refuse(message: str) -> NoReturn:
    """Raise NkiValidationError(message)."""
    raise NkiValidationError(message)


# What a view is made of: nothing yet, slices, slices and at least one integer index, or an access pattern.
WHOLE, SLICED, INDEXED, PATTERN = 0, 1, 2, 3
_REFUSALS = {INDEXED: "slice after index", SLICED: "slice of a slice", PATTERN: "slice of a pattern"}
_OURS = "nki_kernels.simulator."


def refuse_word(rule: str, found: str = "") -> NoReturn:
    """Raise the refusal of the kernel's line that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        frame = frame.f_back
    code = frame.f_code
    raise RefusedError(code.co_name, (refusal(rule, code.co_filename, frame.f_lineno, found),))


def refuse_view_of(view: int) -> NoReturn:
    """A slice of what is no whole tensor."""
    refuse_word(_REFUSALS[view])


def check_sizes(shape: tuple) -> None:
    """Sizes of a tensor are Python's integers."""
    for size in shape:
        if not isinstance(size, int):
            refuse_word("integer size", type(size).__name__)


class Names:
    """The names that tensors of one run have; those of the kernel's parameters are taken from the start."""

    def __init__(self, parameters: tuple[str, ...] = ()) -> None:
        self._taken = set(parameters)

    def take(self, name: str) -> None:
        """Refuse a name that is in use, in loops and helpers, too."""
        if name in self._taken:
            refuse_word("tensor name", name)
        self._taken.add(name)
