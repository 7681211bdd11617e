"""In which arithmetic training takes its matrix products; norms, softmaxes and sums stay fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# The names under which torch says that a processor multiplies bf16 itself: x86 tiles, x86 vectors, ARM.
NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "bf16")


def chosen(asked: str, capabilities: Mapping[str, Any] | None = None) -> str:
    """`bfloat16` or `float32` as asked; for `auto`, bf16 only where the processor has it: emulated it is
    seven times slower than fp32.

    `capabilities`: those of another processor than this one (None), as `torch.cpu.get_capabilities` gives
    them.
    """
    if asked != "auto":
        return asked
    # An older torch does not say it, and is taken to run where bf16 is emulated.
    known = getattr(torch.cpu, "get_capabilities", dict)() if capabilities is None else capabilities
    return "bfloat16" if any(known.get(name) for name in NATIVE_BF16) else "float32"


def products(arithmetic: str) -> Any:
    """The context in which products are taken in `arithmetic`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "bfloat16")
