"""`simulate(kernel)(*arrays)`: the vendor's call shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nki_kernels.frontend.verdict import accept, parameters
from nki_kernels.frontend.versions import version_of
from nki_kernels.simulator.memory import HBM, UNWRITTEN, Machine, running
from nki_kernels.simulator.rules import Names, require
from nki_kernels.simulator.tensor import Tensor
from nki_kernels.simulator.trace import Listener
from nki_kernels.targets import TRN1, Target


@dataclasses.dataclass(frozen=True)
class Placeholder:
    """Stands for an array in a dry run: a shape and an element type, no contents."""

    shape: tuple[int, ...]
    dtype: Any


def simulate(
    kernel: Callable[..., Any],
    target: Target = TRN1,
    listeners: Sequence[Listener] = (),
    dry: bool = False,
    api: str = "0.6",
    language: bool = True,
) -> Callable[..., Any]:
    """A callable that runs `kernel` on numpy arrays and returns numpy arrays.

    `dry` walks the same instructions and checks without contents: shapes, types, limits and capacity are
    held, unwritten reads and sums are not, and the result is None. There, arrays may be `Placeholder`s. `api`
    is a version of nki, "0.2" to "0.7": the call signatures that are enforced and the language that the
    kernel must keep to (`frontend`); with `language=False`, which is for tests of the simulator alone, any
    Python runs. Raises RefusedError (language), NkiValidationError (rules), CapacityError (on-chip memory),
    UninitializedError, or TypeError (a call that `api` does not have).
    """
    version = version_of(api)

    def call(*args: Any, **kwargs: Any) -> Any:
        names = None
        if language:
            accept(kernel, args, kwargs, version.name)
            names = Names(parameters(kernel))
        with running(Machine(target, listeners, dry, version.signatures, names)) as machine:
            inputs = [_to_device(machine, arg, f"arg{i}") for i, arg in enumerate(args)]
            named = {name: _to_device(machine, arg, name) for name, arg in kwargs.items()}
            return _to_host(machine, kernel(*inputs, **named))

    return call


def _to_device(machine: Machine, value: Any, name: str) -> Any:
    if not isinstance(value, (np.ndarray, Placeholder)):
        return value
    require(
        machine.dry or isinstance(value, np.ndarray),
        f"{name}: a Placeholder has no contents and needs a dry run",
    )
    storage = machine.allocate(value.shape, np.dtype(value.dtype), HBM, name)
    storage.data, storage.state = None, None
    if isinstance(value, np.ndarray) and not machine.dry:
        storage.data = np.ascontiguousarray(value).reshape(-1)
    return Tensor.whole(storage)


def _to_host(machine: Machine, result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return tuple(_to_host(machine, item) for item in result)
    if not isinstance(result, Tensor):
        raise TypeError(f"a kernel returns its output tensors, got {type(result).__name__}")
    require(result.buffer == "shared_hbm", f"kernel outputs must be in shared_hbm, got {result.buffer}")
    if machine.dry:
        return None
    low, _ = result.states()
    require(low != UNWRITTEN, f"kernel output '{result.name}' {result.shape} was not written everywhere")
    return result.read().copy()
