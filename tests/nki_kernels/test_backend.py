"""What the switch does beside a vendor's `nki` (a stand-in for one)."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STAND_IN = {
    "__init__.py": "def jit(kernel):\n    return kernel\n",
    "isa.py": "def nc_matmul(dst, stationary, moving):\n    pass\n",
    "language.py": "class NKIObject:\n    pass\n",
}


@pytest.fixture
def nki_0_2(tmp_path):
    """Environment in which an `nki` without a simulator is installed."""
    (tmp_path / "nki").mkdir()
    for name, text in STAND_IN.items():
        (tmp_path / "nki" / name).write_text(text)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {name: value for name, value in os.environ.items() if name != "NKI_KERNELS_BACKEND"} | {
        "PYTHONPATH": os.pathsep.join(paths)
    }


def test_an_nki_without_a_simulator_says_so(nki_0_2):
    program = "from nki_kernels.backend import HAS_NKI, simulate; assert HAS_NKI; simulate(print)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=nki_0_2, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1].startswith(
        "RuntimeError: simulate: expected nki 0.3 or later, found one without a simulator"
    )


def test_tests_of_our_simulator_are_skipped_beside_the_vendors(nki_0_2):
    """Their kernels would call the vendor's instructions."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/nki_kernels/test_planner.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=nki_0_2, capture_output=True, text=True, check=False)
    assert "skipped" in done.stdout.splitlines()[-1] and done.returncode == 0, done.stdout
