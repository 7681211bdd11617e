"""Our own kernels, as production calls them, under every version that reads source: nothing refused, nothing
to warn of. What only a run shows is held wherever a test runs one, since `simulate` keeps the language.
"""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest

import nki_kernels.kernels
from nki_kernels.backend import nisa, nl, simulate
from nki_kernels.cases import MLPCase
from nki_kernels.frontend.catalogue import RefusedError
from nki_kernels.frontend.verdict import check
from nki_kernels.frontend.versions import VERSIONS
from tests.nki_kernels.harness import plan_case

CASE = MLPCase(130, 200, 392, ("uv", "compact", "dense"), (70, 133, 150), "fp32", norm=True, residual=True)


def entry_kernels():
    """Every function under @nki.jit."""
    for info in pkgutil.iter_modules(nki_kernels.kernels.__path__, "nki_kernels.kernels."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            own = inspect.isfunction(value) and value.__module__ == module.__name__
            if own and inspect.getsource(value).startswith("@nki.jit"):
                yield value


KERNELS = list(dict.fromkeys(entry_kernels()))


def test_the_kernels_were_found():
    assert {kernel.__name__ for kernel in KERNELS} >= {"svd_mlp", "gated_up", "xuv", "matmul_tiled"}


@pytest.mark.parametrize("target", VERSIONS)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_every_entry_kernel_is_accepted_without_a_warning(kernel, target):
    plan, x = plan_case(CASE), np.zeros((4, 4), np.float32)
    given = [plan if name == "plan" else x for name in inspect.signature(kernel).parameters]
    assert check(kernel, given, target=target) == []


def words_of_python(x):
    total = 0
    for _a, b in ((1, 2), (3, 4)):
        total += b
    return copied(x)


def sliced_twice(x):
    return copied(x[0:2, :][0:2, :])


def copied(x):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=x)
    return out


@pytest.mark.parametrize("kernel", [words_of_python, sliced_twice], ids=lambda kernel: kernel.__name__)
def test_simulate_runs_nothing_that_the_compiler_refuses(kernel):
    x = np.ones((2, 2), np.float32)
    with pytest.raises(RefusedError, match=kernel.__name__):
        simulate(kernel)(x)
    assert np.array_equal(simulate(kernel, language=False)(x), x)
    assert np.array_equal(simulate(copied)(x), x)


def test_from_0_7_on_python_is_traced_and_views_keep_their_rules():
    x = np.ones((2, 2), np.float32)
    assert np.array_equal(simulate(words_of_python, api="0.7")(x), x)
    with pytest.raises(RefusedError, match="slicing of a slice"):
        simulate(sliced_twice, api="0.7")(x)
