"""The parameter lists of both generations of the `nki` namespace, to which every call of a simulated kernel
is held, and the enumerations of `nki.isa`.

0.2 is the last NKI with documented trn1 support; 0.6 stands for 0.3 and later (the two agree on what our
kernels use). Kernels must call in a way that both accept: required operands first, the rest by names that
exist in the version at hand.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import TypeVar

from nki_kernels.simulator.memory import current


class engine(enum.Enum):
    unknown = 0
    tensor = 1
    vector = 2
    scalar = 3
    gpsimd = 4


class dge_mode(enum.Enum):
    unknown = 0
    none = 1
    swdge = 2
    hwdge = 3


class oob_mode(enum.Enum):
    error = 0
    skip = 1


class matmul_perf_mode(enum.Enum):
    none = 0
    double_row = 1


class reduce_cmd(enum.Enum):
    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3


class nc_version(enum.IntEnum):
    gen2 = 2
    gen3 = 3
    gen4 = 4


def get_nc_version() -> nc_version:
    """NeuronCore version of the running simulation's target."""
    return nc_version(current().target.generation)


_ELEMENTWISE = {
    "activation": "dst op data bias scale reduce_op reduce_res reduce_cmd name",
    "tensor_tensor": "dst data1 data2 op engine name",
    "tensor_scalar": "dst data op0 operand0 reverse0 op1 operand1 reverse1 engine name",
    "scalar_tensor_tensor": "dst data op0 operand0 op1 operand1 reverse0 reverse1 name",
    "tensor_copy": "dst src engine name",
    "memset": "dst value engine name",
    "tensor_reduce": "dst op data axis negate keepdims name",
    "nc_transpose": "dst data engine name",
}
_TABLES = {
    "0.2": {
        **_ELEMENTWISE,
        "nc_matmul": "dst stationary moving is_stationary_onezero is_moving_onezero is_transpose "
        "tile_position tile_size perf_mode name",
        "dma_copy": "dst src dst_rmw_op oob_mode dge_mode unique_indices name",
        "dma_transpose": "dst src axes dge_mode oob_mode name",
    },
    "0.6": {
        **_ELEMENTWISE,
        "nc_matmul": "dst stationary moving is_stationary_onezero is_moving_onezero is_transpose accumulate "
        "tile_position tile_size perf_mode name",
        "dma_copy": "dst src priority oob_mode dge_mode engine name",
        "dma_transpose": "dst src axes priority dge_mode oob_mode name",
    },
}
SIGNATURES: dict[str, dict[str, tuple[str, ...]]] = {
    api: {op: tuple(names.split()) for op, names in table.items()} for api, table in _TABLES.items()
}

Op = TypeVar("Op", bound=Callable[..., None])


def bind(api: str, op: str, args: tuple, kwargs: dict) -> dict:
    """Arguments by name, as version `api` of `op` reads them; raises TypeError where it would."""
    names = SIGNATURES[api][op]
    if len(args) > len(names):
        raise TypeError(f"{op} of nki {api} takes {len(names)} arguments, got {len(args)}")
    bound = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise TypeError(f"{op} of nki {api} has no argument '{name}': expected one of {', '.join(names)}")
        if name in bound:
            raise TypeError(f"{op} of nki {api} got '{name}' twice")
        bound[name] = value
    return bound


def versioned(op: Op) -> Op:
    """Hold every call of `op` to the API version of the running simulation."""

    @functools.wraps(op)
    def call(*args: object, **kwargs: object) -> None:
        op(**bind(current().api, op.__name__, args, kwargs))

    return call  # type: ignore[return-value]
