"""The published algorithms compute what they claim: a baseline that is wrong would be no baseline."""

import numpy as np
import pytest

from nki_kernels.backend import simulate
from nki_kernels.cases import DTYPES, error, random_array
from nki_kernels.kernels.published import blocked_xuv, matmul_spilling, matmul_wide

FP32 = DTYPES["fp32"]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(3)
    return lambda *shape: random_array(rng, shape, FP32, shape[0] ** -0.5)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [(matmul_wide, {}), (matmul_spilling, {"held_tiles": 1, "m_tiles": 2, "n_tiles": 1, "k_tiles": 2})],
)
def test_matmuls_are_matmuls(arrays, kernel, options):
    a, b = arrays(512, 512), arrays(512, 1024)
    assert error(simulate(kernel)(a, b, **options), a.T @ b) < 1e-5


def test_the_papers_kernel_is_x_u_v(arrays):
    x, u, v = arrays(2048, 1024), arrays(2048, 1024), arrays(1024, 1024)
    assert error(simulate(blocked_xuv)(x, u, v), (x.T @ u) @ v) < 1e-5


def test_sizes_that_the_blocks_do_not_divide_are_refused(arrays):
    with pytest.raises(AssertionError, match="expected a multiple of 1024"):
        simulate(blocked_xuv)(arrays(1024, 512), arrays(1024, 1024), arrays(1024, 1024))
