"""How the simulator refuses: one exception, one sentence. Where the vendor's own wording is known it is
kept.
"""

from __future__ import annotations

from typing import NoReturn


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
