"""The NKI programs, written against `nki_kernels.backend` alone."""
