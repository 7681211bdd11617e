"""Entry points for a real vLLM with the real vllm-neuron on a machine without Neuron devices."""

from __future__ import annotations

import pathlib

ENTRY_POINTS = """[vllm.platform_plugins]
neuron = tests.serving.trainium.neuron_platform:register
[vllm.general_plugins]
neuronmlp = neuronmlp_plugin:register
"""


def register() -> str:
    """vllm-neuron's platform without its look at /dev/neuron*, on the stand-ins for the closed wheels."""
    from tests.serving.trainium import neuron_wheels

    neuron_wheels.install()
    return "vllm_neuron.platform.NeuronPlatform"


def write_distribution(folder: pathlib.Path) -> pathlib.Path:
    """An installed distribution, as far as importlib.metadata can tell: put the folder on PYTHONPATH."""
    info = folder / "neuronmlp_on_a_cpu-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: neuronmlp-on-a-cpu\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder
