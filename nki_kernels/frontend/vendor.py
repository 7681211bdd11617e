"""Ask whoever knows best: the vendor's own compiler where `nki` is installed, our front end elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

from nki_kernels import backend
from nki_kernels.frontend.verdict import check
from nki_kernels.frontend.versions import REFERENCE, read_as


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`who` answered, in words, and what it refuses: no sentence at all, or the compiler's."""

    who: str
    refusals: tuple[str, ...]


def verdict(
    kernel: Callable[..., Any], arguments: Sequence[Any], platform: str = "trn1", target: str | None = None
) -> Verdict:
    """Would the compiler take `kernel` with these arguments, without a chip?

    `nki.trace(kernel, grid=None, platform_target=platform).specialize(*arguments)` decides where that exists;
    otherwise our front end does, for nki `target` (by default the version installed, or that of the reference
    stack).
    """
    installed = _installed()
    if installed is not None:
        import nki

        if hasattr(nki, "trace"):
            try:
                nki.trace(kernel, grid=None, platform_target=platform).specialize(*arguments)
            except Exception as error:  # whatever the vendor's compiler raises is its answer
                return Verdict(f"nki {installed} ({platform})", (f"{type(error).__name__}: {error}",))
            return Verdict(f"nki {installed} ({platform})", ())
    target = target or read_as(installed or REFERENCE)
    refused = tuple(str(refusal) for refusal in check(kernel, arguments, target=target) if not refusal.warns)
    reason = "no nki here" if installed is None else f"nki {installed} has no trace"
    return Verdict(f"our front end of nki {target} ({reason})", refused)


def _installed() -> str | None:
    """The version of the vendor's nki, if our kernels are written against it in this process."""
    if not backend.HAS_NKI:
        return None
    try:
        return importlib.metadata.version("nki")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
