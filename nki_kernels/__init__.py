"""NKI kernels for low-rank MLPs, with the simulator and the cost model that judge them off the chip."""

from nki_kernels.source import source_digest

__all__ = ["source_digest"]
