"""NKI kernels for low-rank MLPs, with the simulator and the cost model that judge them off the chip."""
