"""Low-rank (SVD) MLPs for LLMs: compress a Hugging Face folder, serve it with vLLM.

Importing this package loads no torch, no vLLM and no NKI: vLLM imports it in every process through the
`vllm.general_plugins` entry point, before it knows whether the plugin is needed at all.
"""

__version__ = "0.1.0"
__all__ = ["__version__", "register"]


def register() -> None:
    """Tell vLLM about the `neuronmlp` checkpoint format. Idempotent, cheap, called in every vLLM process."""
    from neuronmlp_plugin.serving import register as register_serving

    register_serving()
