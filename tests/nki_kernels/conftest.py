import os

import pytest

os.environ.setdefault(
    "NEURON_PLATFORM_TARGET_OVERRIDE", "trn1"
)  # the vendor's simulator is one of trn3 unless told before it is imported

from nki_kernels.backend import HAS_NKI


@pytest.fixture(autouse=True)
def our_simulator(request):
    """Kernels call the `nisa` of one simulator, and all but test_vendor.py are about ours."""
    if HAS_NKI and request.node.get_closest_marker("nki") is None:
        pytest.skip("these tests are about our simulator; set NKI_KERNELS_BACKEND=simulator")
