import pytest

from tests.nki_kernels.harness import needs_our_simulator


@pytest.fixture(autouse=True)
def our_simulator():
    if needs_our_simulator():
        pytest.skip("the cost model listens to our simulator; set NKI_KERNELS_BACKEND=simulator")
