"""`simulate` for tests of the simulator itself: kernels may be any Python, closures and lambdas included."""

import functools

from nki_kernels import simulator

simulate = functools.partial(simulator.simulate, language=False)
