"""The enumerations of `nki.isa`."""

from __future__ import annotations

import enum

from nki_kernels.simulator.memory import current


class engine(enum.Enum):  # noqa: N801 - the vendor's spelling
    unknown = 0
    tensor = 1
    vector = 2
    scalar = 3
    gpsimd = 4


class dge_mode(enum.Enum):  # noqa: N801
    unknown = 0
    none = 1
    swdge = 2
    hwdge = 3


class oob_mode(enum.Enum):  # noqa: N801
    error = 0
    skip = 1


class matmul_perf_mode(enum.Enum):  # noqa: N801
    none = 0
    double_row = 1


class reduce_cmd(enum.Enum):  # noqa: N801
    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3


class nc_version(enum.IntEnum):  # noqa: N801
    gen2 = 2
    gen3 = 3
    gen4 = 4


def get_nc_version() -> nc_version:
    """NeuronCore version of the running simulation's target."""
    return nc_version(current().target.generation)
