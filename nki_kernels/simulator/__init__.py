"""Runs our NKI subset on numpy, refuses what the hardware would refuse, and emits a trace.

Modelled: element types as stored (bfloat16 by ml_dtypes), fp32 arithmetic, round to nearest even, unwritten
memory, PSUM accumulation rules, every limit of nki.isa that our kernels meet, and the live capacity of SBUF
and PSUM. Not modelled: time, the piecewise approximations of activation functions, SBUF fragmentation,
collectives, tfloat32.
"""

from nki_kernels.simulator.rules import CapacityError, NkiValidationError, UninitializedError
from nki_kernels.simulator.simulation import Placeholder, simulate

__all__ = ["CapacityError", "NkiValidationError", "Placeholder", "UninitializedError", "simulate"]
