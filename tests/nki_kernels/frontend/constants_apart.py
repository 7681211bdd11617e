"""See constants_here."""

SIZE = 8


def double(size):
    return size + SIZE


def kernel(x):
    double(SIZE)
    return x
