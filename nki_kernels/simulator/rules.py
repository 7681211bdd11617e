"""How the simulator refuses: one exception, one sentence. Where the vendor's own wording is known it is kept."""

from __future__ import annotations


class NkiValidationError(AssertionError):
    """The hardware or its compiler would refuse this. An AssertionError, as most of the vendor's checks are."""


class CapacityError(NkiValidationError):
    """More live on-chip memory than there is; the message lists who holds what."""


class UninitializedError(NkiValidationError):
    """An instruction reads memory that nothing has written."""


def require(condition: bool, message: str) -> None:
    """Raise NkiValidationError(message) unless `condition` holds."""
    if not condition:
        raise NkiValidationError(message)
