"""Make vLLM build our MLPs: `cpu/` inside vLLM itself, `trainium/` through NxD Inference. Only here are vllm
and NxDI imported.
"""

from __future__ import annotations

import importlib.util


def register() -> None:
    """Register with whatever serving stack is installed; silent where none is. Called by vLLM in each of its
    processes, so idempotent.
    """
    if importlib.util.find_spec("vllm") is not None:
        import neuronmlp_plugin.serving.cpu.quantization  # noqa: F401  (importing it registers it, once)
    from neuronmlp_plugin.serving import trainium

    trainium.register()
