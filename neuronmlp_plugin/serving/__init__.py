"""Make vLLM build our MLPs: `cpu/` inside vLLM itself, `trainium/` through NxD Inference. Only here are vllm and NxDI imported."""

from __future__ import annotations


def register() -> None:
    """Register with whatever serving stack is installed; silent where none is. Called by vLLM in each of its processes."""
