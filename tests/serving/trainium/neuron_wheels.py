"""Import-time stand-ins for the closed Neuron wheels, so that the real public sources of NxD Inference and
NxD can be imported and run in NxDI's own CPU mode.

They are honest: whatever nobody needs on a CPU may be named, indexed (`kernel[grid]`) and subclassed, and
raises WheelCalledError when it is called. What importing or the CPU mode does call stands in `_NEEDED`, each
with the least that it takes. A wheel that is really installed is left alone.

One method of NxDI is lent, too: the CPU mode of 0.8 calls `_get_captured_tensors_offset`, which its text
models lack (0.9 gives it to them: 0 where no tensors are captured). No device path calls it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from neuronmlp_plugin.serving.trainium import run_after_import

WHEELS = ("torch_neuronx", "neuronxcc", "libneuronxla", "nki", "nkilib", "neuronxlogger", "torch_xla")


class WheelCalledError(RuntimeError):
    """Something that only a Neuron device can do was asked for on a CPU."""


class _Name(type):
    """Type of the classes that stand for names of the closed wheels."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "path" not in cls.__dict__:  # a subclass that somebody made, say a mixin: it may be instantiated
            return super().__call__(*args, **kwargs)
        raise WheelCalledError(f"{cls.path} was called; it needs the Neuron wheels")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, stand_in(f"{cls.path}.{name}"))
        return cls.__dict__[name]

    def __getitem__(cls, grid: Any) -> Any:
        return cls


def stand_in(path: str) -> Any:
    return _Name(path.rpartition(".")[2], (), {"path": path})


class _Kernel:
    """What a jit decorator gives back: may be indexed by a launch grid, and no more."""

    def __init__(self, function: Any) -> None:
        self.function, self.__name__ = function, getattr(function, "__name__", str(function))

    def __getitem__(self, grid: Any) -> _Kernel:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise WheelCalledError(f"kernel {self.__name__} was launched; it needs the Neuron wheels")


def _decorator(make: Callable[[Any], Any]) -> Callable[..., Any]:
    """Usable with and without arguments."""

    def decorate(*args: Any, **kwargs: Any) -> Any:
        return make(args[0]) if args and callable(args[0]) else make

    return decorate


class _CollectivesConfig:
    """NxD reads the ring partners of each rank even without context parallelism, and then uses none."""

    def __init__(self, replica_groups: Any = None, **_: Any) -> None:
        self.rank_src_tgt_pairs = {
            rank: [(group[i], group[(i + 1) % len(group)]) for i in range(len(group))]
            for group in replica_groups or []
            for rank in group
        }


class _SkipMode:
    """A record of two flags that NxD's mixture of experts builds when it is imported."""

    def __init__(self, skip_token: bool = False, skip_weight: bool = False) -> None:
        self.skip_token, self.skip_weight = skip_token, skip_weight


def _platform_target(*_: Any, **__: Any) -> str:
    return os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "trn1")


_JIT, _AS_IT_IS = _decorator(_Kernel), _decorator(lambda function: function)
_NEEDED = {
    "neuronxcc.nki._pre_prod_kernels.collectives.CollectivesConfig": _CollectivesConfig,
    "neuronxcc.nki._private_kernels.collectives.CollectivesConfig": _CollectivesConfig,
    "neuronxcc.nki._pre_prod_kernels.blockwise_mm.SkipMode": _SkipMode,
    "nkilib.core.moe.moe_cte.moe_cte_utils.SkipMode": _SkipMode,
    "torch_neuronx.utils.get_platform_target": _platform_target,
    "torch_neuronx.utils.utils.get_platform_target": _platform_target,
    "torch_neuronx.xla_impl.ops.nki_jit": _JIT,
    "torch_neuronx.xla_impl.ops.xla_hlo_call": _JIT,
    "torch_neuronx.xla_impl.base.xla_hlo_call": _JIT,
    "torch_neuronx.xla_impl.base.xla_call": _JIT,
    "neuronxcc.nki.jit": _JIT,
    "nki.jit": _JIT,
    "neuronxcc.nki.compiler.skip_middle_end_transformations": _AS_IT_IS,
    "neuronxcc.nki.compiler.enable_stack_allocator": _AS_IT_IS,
}


class _Wheel(types.ModuleType):
    """A module of a closed wheel: each name of it is needed, another module, or a stand-in."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        found = _NEEDED.get(path) or sys.modules.get(path) or stand_in(path)
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, wheels: list[str]) -> None:
        self.wheels = wheels

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] not in self.wheels:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Wheel(spec.name)
        if spec.name == "torch_neuronx":
            module.__version__ = "2.9.0"  # NxD's ModelBuilder insists on a 2.x version
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _lend_offset(model_base: types.ModuleType) -> None:
    base = model_base.NeuronBaseForCausalLM  # type: ignore[attr-defined]
    if not hasattr(base, "_get_captured_tensors_offset"):
        base._get_captured_tensors_offset = lambda self: 0


def install() -> None:
    """Put the stand-ins in place of every wheel that is not installed. Before NxDI is imported;
    idempotent.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    absent = [name for name in WHEELS if importlib.util.find_spec(name) is None]
    if importlib.util.find_spec("torchvision") is None:  # vision models of NxDI's table name it
        import transformers.utils.import_utils  # noqa: F401  (which must have noticed that it is absent)

        absent.append("torchvision")
    sys.meta_path.insert(0, _Finder(absent))
    import torch

    try:
        _ = torch.classes.neuron.SPMDModel
    except RuntimeError:  # NxD names TorchScript classes of torch_neuronx in annotations
        torch.classes.neuron = _Wheel("torch.classes.neuron")
    os.environ.setdefault("NXD_CPU_MODE", "1")
    run_after_import("neuronx_distributed_inference.models.model_base", _lend_offset)
