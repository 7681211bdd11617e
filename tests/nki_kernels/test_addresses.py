"""Tensors at addresses of the kernel's choice: who may lie where, and what an overlap does."""

import numpy as np
import pytest

from nki_kernels.simulator import isa as nisa
from nki_kernels.simulator import language as nl
from nki_kernels.simulator import simulate
from nki_kernels.simulator.rules import CapacityError, NkiValidationError

FP32 = np.dtype(np.float32)
X = np.arange(128 * 64, dtype=np.float32).reshape(128, 64)


def at(offset, cols=64, buffer=nl.sbuf, partition=0):
    return nl.ndarray((128, cols), dtype=FP32, buffer=buffer, address=(partition, offset))


def run(body, **options):
    """Let `body(x, out)` do something on the way from x to an output of the same shape."""

    def kernel(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        body(x, out)
        return out

    return simulate(kernel, **options)(X)


def two_on_the_same_bytes(second_offset, read_first_again):
    def body(x, out):
        first, second = at(0), at(second_offset)
        nisa.dma_copy(dst=first, src=x)
        nisa.tensor_copy(dst=second, src=first)
        nisa.dma_copy(dst=out, src=first if read_first_again else second)

    return body


@pytest.mark.parametrize("dry", [False, True])
def test_two_tensors_in_use_on_the_same_bytes_are_refused(dry):
    with pytest.raises(NkiValidationError, match=r"from byte 0 on, but 'sbuf\d' lies on the same bytes"):
        run(two_on_the_same_bytes(128, True), dry=dry)
    run(two_on_the_same_bytes(256, True), dry=dry)


def test_one_that_is_used_up_may_be_written_over():
    assert np.array_equal(run(two_on_the_same_bytes(128, False)), X)


def test_what_is_overwritten_is_not_written_again_either():
    def body(x, out):
        first, second = at(0), at(0)
        nisa.dma_copy(dst=first, src=x)
        nisa.tensor_copy(dst=second, src=first)
        nisa.dma_copy(dst=first, src=x)
        nisa.dma_copy(dst=out, src=second)

    with pytest.raises(NkiValidationError, match="lies on the same bytes and was written since"):
        run(body)


def test_a_write_beside_the_shared_bytes_destroys_nothing():
    def body(x, out):
        first, second = at(0), at(128)
        nisa.dma_copy(dst=first, src=x)
        nisa.memset(second[:, 32:64], 0.0)
        nisa.dma_copy(dst=out, src=first)

    assert np.array_equal(run(body), X)


def test_a_fresh_tensor_holds_nothing_of_what_lay_there():
    def body(x, out):
        first, second = at(0), at(0)
        nisa.dma_copy(dst=first, src=x)
        nisa.dma_copy(dst=out, src=second)

    with pytest.raises(NkiValidationError, match="expected written memory"):
        run(body)


def test_a_bank_of_psum_holds_one_sum_at_a_time():
    def body(x, out):
        whole = at(0)
        nisa.dma_copy(dst=whole, src=x)
        first, second = (
            nl.ndarray((64, 64), dtype=FP32, buffer=nl.psum, address=(0, 2048)) for _ in range(2)
        )
        for total in (first, second):
            nisa.nc_matmul(total, whole, whole, accumulate=False)
        nisa.tensor_copy(dst=at(1024)[0:64, :], src=first)

    with pytest.raises(NkiValidationError, match="in psum from byte 2048 on"):
        run(body)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: at(0, buffer=nl.psum), None, ""),
        (
            lambda: at(100, buffer=nl.psum),
            NkiValidationError,
            "multiple of 2048: a PSUM tensor begins with a bank",
        ),
        (lambda: at(8 * 2048, buffer=nl.psum), CapacityError, "expected banks below 8"),
        (lambda: at(2), NkiValidationError, "multiple of 4: the element size"),
        (lambda: at(-4), NkiValidationError, "two Python integers"),
        (lambda: at(np.int64(0)), NkiValidationError, "two Python integers"),
        (lambda: at(0, partition=32), NkiValidationError, "address partition 32 is not modelled"),
        (lambda: at(0, buffer=nl.hbm), NkiValidationError, "an address needs a tensor in sbuf or psum"),
        (lambda: at(180_224 - 252), CapacityError, "expected at most 180224 bytes per partition"),
        (lambda: at(180_224 - 256), None, ""),
    ],
)
def test_addresses_are_checked(make, error, words):
    def body(x, out):
        make()
        nisa.dma_copy(dst=out, src=x)

    if error is None:
        run(body)
    else:
        with pytest.raises(error, match=words):
            run(body)
