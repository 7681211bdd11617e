"""The one switch: the vendor's `nki` where it is installed, our simulator of it elsewhere.

Kernels import `nki` (for `@nki.jit`: the compiler knows the decorator by this dotted name), `nl` and `nisa`
from here and nothing else of NKI. `TAKES_ACCUMULATE` says which call
convention is in force: from 0.3 on nc_matmul is told whether it starts a sum, before that the first write of
a fresh PSUM tile does.

Environment: NKI_KERNELS_BACKEND=simulator chooses our simulator, with its stricter checks, even where `nki`
is installed.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import types
from collections.abc import Callable
from typing import Any

HAS_NKI = importlib.util.find_spec("nki") is not None and os.environ.get("NKI_KERNELS_BACKEND") != "simulator"


def no_simulator(*_kernel: Any, **_options: Any) -> Callable[..., Any]:
    """Stands for `simulate` where the vendor's nki has none."""
    raise RuntimeError(
        "simulate: expected nki 0.3 or later, found one without a simulator; set "
        "NKI_KERNELS_BACKEND=simulator for ours."
    )


if HAS_NKI:
    import nki
    import nki.isa as nisa
    import nki.language as nl

    simulate: Callable[..., Any] = getattr(nki, "simulate", no_simulator)  # from 0.3 on
    TAKES_ACCUMULATE = "accumulate" in inspect.signature(nisa.nc_matmul).parameters
else:
    from nki_kernels.simulator import isa as nisa
    from nki_kernels.simulator import language as nl
    from nki_kernels.simulator.simulation import simulate

    TAKES_ACCUMULATE = True

    def jit(kernel: Callable[..., Any]) -> Callable[..., Any]:
        """Marks an entry kernel; nothing to compile here."""
        return kernel

    nki: Any = types.SimpleNamespace(jit=jit)  # type: ignore[no-redef]


__all__ = ["HAS_NKI", "TAKES_ACCUMULATE", "nisa", "nki", "nl", "no_simulator", "simulate"]
