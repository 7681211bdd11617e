"""What every kernel must return, in NumPy: same names, plain `[out, in]` weights instead of packed ones."""

from nki_kernels.reference.mlp import down, gated_up, svd_mlp, xuv

__all__ = ["down", "gated_up", "svd_mlp", "xuv"]
