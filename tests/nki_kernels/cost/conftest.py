import pytest

from nki_kernels.backend import HAS_NKI


@pytest.fixture(autouse=True)
def our_simulator():
    if HAS_NKI:
        pytest.skip("the cost model listens to our simulator; set NKI_KERNELS_BACKEND=simulator")
