"""product.c, compiled for processors of every width of vectors and checked against sums in double: those that
this machine can run, and a 64-bit Arm under an emulator where one is installed.
"""

from __future__ import annotations

import pathlib
import platform
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent
SOURCES = HERE.parent.parent.parent / "neuronmlp_plugin" / "serving" / "cpu"
CPUINFO = pathlib.Path("/proc/cpuinfo")
FLAGS = set(CPUINFO.read_text().split()) if CPUINFO.is_file() else set()
# -march, what the processor must have for it, and the width of the vectors that it should get
X86 = [
    ("x86-64", set(), 4),
    ("x86-64-v3", {"avx2", "fma"}, 8),
    ("icelake-server", {"avx512f", "avx512vl", "avx512_vbmi2", "avx512_vnni"}, 16),  # no bf16, no tiles
    ("cooperlake", {"avx512_bf16"}, 16),  # bf16 in pairs
    ("sapphirerapids", {"amx_bf16", "amx_tile", "avx512_fp16"}, 16),  # tiles
]

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def built(tmp_path, compiler, *flags) -> pathlib.Path:
    program = tmp_path / "check"
    command = [compiler, "-O3", "-fopenmp", "-Wall", "-Wextra", "-Werror", *flags, f"-I{SOURCES}"]
    done = subprocess.run(
        [*command, str(HERE / "check_product.c"), "-o", str(program), "-lm"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return program


def said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="this is no x86-64")
@pytest.mark.parametrize(("machine", "needed", "width"), X86, ids=[case[0] for case in X86])
def test_products_on_an_x86(tmp_path, machine, needed, width):
    if not needed <= FLAGS:
        pytest.skip(f"this processor has no {', '.join(sorted(needed - FLAGS))}")
    output = said([str(built(tmp_path, "cc", f"-march={machine}"))])
    assert f"vectors of {width} floats" in output


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-gcc") is None or shutil.which("qemu-aarch64") is None,
    reason="no gcc-aarch64-linux-gnu or no qemu-user",
)
def test_products_on_an_arm_under_an_emulator(tmp_path):
    program = built(tmp_path, "aarch64-linux-gnu-gcc", "-static")
    assert "vectors of 4 floats" in said(["qemu-aarch64", str(program)])
