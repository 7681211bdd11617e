"""Where the vendor's `nki` is installed: the same cases on its own simulator (marker `nki`; elsewhere there
is nothing to run).
"""

import inspect

import pytest

from nki_kernels import backend
from nki_kernels.cases import MAX_ERROR, MLPCase, error, mlp_grid
from nki_kernels.simulator.signatures import SIGNATURES
from tests.nki_kernels.harness import run_svd_mlp

pytestmark = [
    pytest.mark.nki,
    pytest.mark.skipif(
        not backend.HAS_NKI or backend.simulate is backend.no_simulator,
        reason="needs the vendor's nki, 0.3 or later, with its simulator",
    ),
]


@pytest.mark.parametrize("case", list(mlp_grid())[::6], ids=str)
def test_the_vendors_simulator_gives_the_reference(case: MLPCase):
    found, expected = run_svd_mlp(case)
    assert error(found, expected) <= MAX_ERROR[case.dtype]


@pytest.mark.parametrize("op", SIGNATURES["0.6"])
def test_our_signature_table_is_theirs(op):
    """In order, since calls may be positional; but for `name`, which newer versions may have moved back."""
    *leading, name = SIGNATURES["0.6"][op]
    theirs = list(inspect.signature(getattr(backend.nisa, op)).parameters)
    assert theirs[: len(leading)] == leading and name in theirs
