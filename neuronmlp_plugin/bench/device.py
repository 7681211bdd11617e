"""How long a launch takes on a NeuronCore, for `bench tune --measure`.

Written from the documentation of Neuron SDK 2.28, and **never run on a device**: there was none. Its use of
torch_xla 2.9 was tried on a CPU, with torch operations; that NKI kernels are recorded and run as those are is
what the documentation says.

torch_xla records launches and runs them as one graph when asked to. Recording traces the kernel anew, on the
host, so it is not timed; and the difference between a graph of several launches and a graph of one is free of
what starting a graph costs the host.
"""

from __future__ import annotations

import importlib.util
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from neuronmlp_plugin.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from nki_kernels.tile_plan import Plan

LAUNCHES = 5  # in the larger graph: each makes it longer to compile
ROUNDS = 20
WARMUP = 3  # the first round compiles both graphs
SCALE = 0.02  # small enough that no product leaves the range of fp16


def neuron_runtime() -> Any:
    """The package torch_xla, with a NeuronCore as its device. Raises UsageError where there is none to
    measure on.
    """
    from nki_kernels.backend import HAS_NKI

    absent = [
        f"no {name}" for name in ("torch_xla", "torch_neuronx") if importlib.util.find_spec(name) is None
    ]
    absent += [] if HAS_NKI else ["no nki"]
    absent += [] if any(pathlib.Path("/dev").glob("neuron*")) else ["no /dev/neuron*"]
    if not absent:
        import torch_neuronx  # noqa: F401 -- makes NeuronCores torch_xla's devices
        import torch_xla
        import torch_xla.core.xla_model
        import torch_xla.runtime

        kind = torch_xla.runtime.device_type()
        if kind == "NEURON":
            return torch_xla
        absent = [f"an XLA device of type {kind}"]
    raise UsageError(
        "bench tune --measure: expected a Neuron device and the packages of its SDK, found "
        f"{', '.join(absent)}; "
        "run on a trn1 instance in the AWS image's own venv, or leave out --measure to simulate."
    )


def plan_us(xla: Any, dtype: np.dtype, tp: int, plan: Plan) -> float:
    """Measured time in us of the launch that runs `plan` on one of `tp` cores; `xla` is the package
    torch_xla.
    """
    from nki_kernels.cost.launches import launch_of

    return measure_us(XlaCore(xla, *launch_of(plan, dtype, tp)))


class Core(Protocol):
    """Something that records launches, and runs all that it has recorded when asked to."""

    def record(self, number: int) -> None:
        """Add a launch, on inputs of its own for each number, to the next run."""

    def run(self) -> None:
        """Run what was recorded, and wait for the end of it."""


def measure_us(core: Core, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median time of a launch in us; `clock` gives seconds. Raises UsageError where noise hides it."""
    found = []
    for _ in range(WARMUP + ROUNDS):
        one, several = (_graph_us(core, launches, clock) for launches in (1, LAUNCHES))
        # What starting a graph costs is in both.
        found.append((several - one) / (LAUNCHES - 1))
    median = statistics.median(found[WARMUP:])
    if median <= 0:
        raise UsageError(
            f"bench tune --measure: expected {LAUNCHES} launches to take longer than one, found a launch of "
            f"{median:.1f} us; measure while nothing else runs on the device and its host."
        )
    return median


def _graph_us(core: Core, launches: int, clock: Callable[[], float]) -> float:
    for number in range(launches):
        core.record(number)
    began = clock()
    core.run()
    return (clock() - began) * 1e6


class XlaCore:
    """torch_xla's default device. Raises UsageError where what the kernel returns is no result.

    Every launch has inputs of its own, weights too, as the layers of a model have: of equal launches a
    compiler may keep one.
    """

    def __init__(self, xla: Any, kernel: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.xla, self.kernel = xla, kernel
        self.inputs = [random_inputs(arguments, xla.device(), seed) for seed in range(LAUNCHES)]
        self.outputs: list[torch.Tensor] = []
        self.record(0)
        self._check(self.outputs[0].float().cpu())
        self.outputs.clear()

    def _check(self, output: torch.Tensor) -> None:
        """Old stacks import new kernels and return zeros without a word: those were not run, whatever they
        took.
        """
        if not (output.isfinite().all() and output.any()):
            raise UsageError(
                "bench tune --measure: expected a kernel's numbers, finite and not all zero, found "
                f"{output.flatten()[:3].tolist()} ...; "
                "run `neuronmlp doctor` to see whether the installed versions belong together."
            )

    def record(self, number: int) -> None:
        self.outputs.append(self.kernel(*self.inputs[number]))  # what nobody holds is not computed

    def run(self) -> None:
        self.xla.sync()
        # sync(wait=True) was seen to return before the graph's end, on a CPU
        self.xla.core.xla_model.wait_device_ops()
        self.outputs.clear()


def random_inputs(arguments: tuple[Any, ...], device: Any, seed: int) -> tuple[Any, ...]:
    """`arguments` with a tensor of small normal numbers for each placeholder, packed weights too: no time
    depends on values.
    """
    import torch

    from nki_kernels.simulator import Placeholder

    generator = torch.Generator().manual_seed(seed)

    def tensor(shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * SCALE).to(getattr(torch, dtype.name)).to(device)

    return tuple(tensor(a.shape, a.dtype) if isinstance(a, Placeholder) else a for a in arguments)
