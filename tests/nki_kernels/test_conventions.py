"""Every call of every kernel is held to the signatures of nki 0.2 and of 0.3 and later, and to the words that
older compilers know.
"""

import ast
import pathlib

import numpy as np
import pytest

import nki_kernels.kernels
import nki_kernels.tile_plan
import nki_kernels.tiling
from nki_kernels import backend
from nki_kernels.cases import DTYPES, MAX_ERROR, MLPCase, error, random_array
from nki_kernels.kernels.plain_matmul import (
    matmul_blocked,
    matmul_hoisted,
    matmul_tiled,
    naive_fused_xuv,
    unfused_xuv,
)
from nki_kernels.simulator import isa as nisa
from nki_kernels.simulator import language as nl
from nki_kernels.simulator import simulate
from nki_kernels.simulator.signatures import SIGNATURES, bind
from tests.nki_kernels.harness import run_svd_mlp

KERNELS = sorted(pathlib.Path(nki_kernels.kernels.__file__).parent.glob("*.py"))
# What kernels take as arguments, or call, without being kernels.
SHARED = [pathlib.Path(module.__file__) for module in (nki_kernels.tiling, nki_kernels.tile_plan)]


@pytest.fixture(params=["0.2", "0.6"])
def api(request, monkeypatch):
    monkeypatch.setattr(backend, "TAKES_ACCUMULATE", request.param != "0.2")
    return request.param


@pytest.mark.parametrize(
    "forms", [("uv", "compact", "dense"), ("compact", "dense", "compact"), ("dense", "uv", "uv")]
)
def test_svd_mlp_computes_the_same_under_both_conventions(api, forms):
    case = MLPCase(130, 200, 392, forms, (70, 133, 150), "fp32", norm=True, residual=True)
    found, expected = run_svd_mlp(case, api=api)
    assert error(found, expected) <= MAX_ERROR["fp32"]


@pytest.mark.parametrize(
    "kernel", [matmul_tiled, matmul_hoisted, matmul_blocked], ids=lambda kernel: kernel.__name__
)
def test_the_tutorial_matmuls_compute_the_same_under_both_conventions(api, kernel):
    rng = np.random.default_rng(6)
    lhs_t, rhs = (random_array(rng, shape, DTYPES["fp32"]) for shape in ((256, 512), (256, 1024)))
    blocks = {"m_tiles": 2, "n_tiles": 1, "k_tiles": 1} if kernel is matmul_blocked else {}
    assert error(simulate(kernel, api=api)(lhs_t, rhs, **blocks), lhs_t.T @ rhs) <= MAX_ERROR["fp32"]


def test_the_blocked_tutorial_matmul_accepts_its_own_blocks_in_bf16():
    """Its running sums are kept in bf16, so long sums err by more than storing does; AWS's kernel shares
    that.
    """
    rng = np.random.default_rng(6)
    lhs_t, rhs = (random_array(rng, shape, DTYPES["bf16"]) for shape in ((2048, 2048), (2048, 1024)))
    found = error(simulate(matmul_blocked)(lhs_t, rhs), lhs_t.astype(np.float32).T @ rhs.astype(np.float32))
    assert 2**-9 < found <= MAX_ERROR["bf16"]


@pytest.mark.parametrize("kernel", [unfused_xuv, naive_fused_xuv], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_simple_kernels_compute_the_same_under_both_conventions(api, kernel, dtype):
    rng = np.random.default_rng(7)
    x, u, v = (
        random_array(rng, shape, DTYPES[dtype], shape[0] ** -0.5)
        for shape in ((200, 130), (200, 140), (140, 600))
    )
    wide = [a.astype(np.float32) for a in (x, u, v)]
    z = (wide[0].T @ wide[1]).astype(DTYPES[dtype]).astype(np.float32)
    assert error(simulate(kernel, api=api)(x, u, v), z @ wide[2]) <= MAX_ERROR[dtype]


def test_each_convention_refuses_the_words_of_the_other():
    def told(dst, src):
        nisa.nc_matmul(
            nl.ndarray((4, 4), nl.float32, nl.psum),
            nl.zeros((4, 4), nl.float32),
            nl.zeros((4, 4), nl.float32),
            accumulate=False,
        )

    with pytest.raises(TypeError, match=r"nc_matmul of nki 0\.2 has no argument 'accumulate'"):
        simulate(told, api="0.2")(None, None)
    with pytest.raises(TypeError, match=r"dma_copy of nki 0\.6 has no argument 'unique_indices'"):
        bind("0.6", "dma_copy", (), {"unique_indices": True})
    with pytest.raises(TypeError, match="got 'dst' twice"):
        bind("0.6", "memset", (1,), {"dst": 2})
    with pytest.raises(TypeError, match="takes 4 arguments, got 5"):
        bind("0.2", "tensor_copy", (1, 2, 3, 4, 5), {})
    with pytest.raises(ValueError, match="target: expected a version of nki"):
        simulate(told, api="0.1")


def test_the_tables_name_every_modelled_instruction_with_dst_first():
    modelled = {name for name in nisa.__all__ if hasattr(getattr(nisa, name), "__wrapped__")}
    for table in SIGNATURES.values():
        assert table.keys() == modelled
        assert all(names[0] == "dst" for names in table.values())


FORBIDDEN = (
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.Yield,
    ast.YieldFrom,
    ast.Try,
    ast.With,
    ast.Starred,
    ast.Is,
    ast.IsNot,
    ast.NamedExpr,
    ast.Global,
    ast.Nonlocal,
    ast.AsyncFunctionDef,
    ast.Await,
    ast.Match,
)


@pytest.mark.parametrize("path", KERNELS + SHARED, ids=lambda path: path.stem)
def test_kernels_keep_to_the_words_of_the_compilers_before_0_7(path):
    """No generators, comprehensions, lambdas, `is`, exceptions or context managers, and no keyword-only
    arguments.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, FORBIDDEN), f"{path.name}:{node.lineno}: {type(node).__name__}"
        if isinstance(node, ast.FunctionDef):
            assert not node.args.kwonlyargs and not node.args.vararg and not node.args.kwarg, (
                f"{path.name}:{node.lineno}"
            )


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_nki_only_through_the_backend(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            root = (node.module or "").split(".")[0]
            assert root in ("__future__", "typing", "nki_kernels"), node.module
            assert not (node.module or "").startswith("nki_kernels.simulator"), node.module
        assert not isinstance(node, ast.Import), ast.dump(node)
