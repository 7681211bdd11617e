"""A kernel whose helper comes from a module that gives SIZE another value."""

from tests.nki_kernels.frontend.constants_apart import double

SIZE = 4


def kernel(x):
    double(SIZE)
    return x
