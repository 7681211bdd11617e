"""The compiled library is loaded only whole, ours and from a place that is ours; whatever is amiss ends in a
build or in the slow path with a warning, never in the end of the process.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import time

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (see README, extra [cpu])"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]
_LOAD = (
    "from neuronmlp_plugin.serving.cpu.compiled import load_products as load; print('LOADED', load() is not "
    "None)"
)


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The module, with a small source and an empty cache of its own."""
    from neuronmlp_plugin.serving.cpu import library

    source = tmp_path / "source" / "product.c"
    source.parent.mkdir()
    source.write_text("int neuronmlp_products(void) { return 7; }\n")
    monkeypatch.setattr(library, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return library


def test_the_library_names_the_kernels_of_this_processor():
    from neuronmlp_plugin.serving.cpu.library import kernels_of

    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    said = kernels_of(shutil.which("cc"))
    assert ("AVX-512" in said) == ("avx512f" in flags)
    assert "AMX" not in said or "amx_tile" in flags


def cached(tmp_path) -> pathlib.Path:
    (found,) = (tmp_path / "cache" / "neuronmlp").glob("*.so")
    return found


def rewrite(path: pathlib.Path, content: bytes) -> None:
    """As a new file: this process has the old one mapped, and would end in a bus error where it was cut."""
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o700)


def answer(library) -> int:
    return library.open_library(shutil.which("cc")).neuronmlp_products()


def test_a_library_is_compiled_once_and_belongs_to_its_user_alone(library, tmp_path):
    assert answer(library) == 7
    before = cached(tmp_path).stat()
    assert answer(library) == 7 and cached(tmp_path).stat().st_mtime_ns == before.st_mtime_ns
    assert stat.S_IMODE(before.st_mode) == 0o700 and before.st_uid == os.geteuid()
    assert not [name for name in os.listdir(tmp_path / "cache" / "neuronmlp") if not name.endswith(".so")]


@pytest.mark.parametrize("keep", [0, 10, 4096, -1])
def test_a_library_that_was_cut_short_is_compiled_again(library, tmp_path, keep):
    answer(library)
    whole = cached(tmp_path).read_bytes()
    rewrite(cached(tmp_path), whole[:keep])
    assert answer(library) == 7
    assert len(cached(tmp_path).read_bytes()) == len(whole)


def test_a_changed_byte_is_found(library, tmp_path):
    answer(library)
    path = cached(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    rewrite(path, content)
    assert library._load_checked(path) is None
    assert answer(library) == 7


def test_a_link_is_replaced_and_not_followed(library, tmp_path):
    answer(library)
    path, other = cached(tmp_path), tmp_path / "other.so"
    shutil.move(path, other)
    path.symlink_to(other)
    assert answer(library) == 7
    assert not path.is_symlink() and other.is_file()


def test_a_file_or_folder_that_others_may_write_is_not_trusted(library, tmp_path):
    answer(library)
    path = cached(tmp_path)
    path.chmod(0o722)
    assert library._load_checked(path) is None
    assert answer(library) == 7 and stat.S_IMODE(cached(tmp_path).stat().st_mode) == 0o700
    path.parent.chmod(0o777)
    stamp = path.stat().st_mtime_ns
    assert answer(library) == 7  # from a private place
    assert path.stat().st_mtime_ns == stamp and library._private_folder(tmp_path / "cache") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_file_of_another_user_is_not_loaded(library, tmp_path):
    answer(library)
    os.chown(cached(tmp_path), 12345, -1)
    assert library._load_checked(cached(tmp_path)) is None
    assert answer(library) == 7 and cached(tmp_path).stat().st_uid == os.geteuid()


def test_a_folder_that_is_a_link_or_a_file_is_left_alone(library, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "neuronmlp").symlink_to(tmp_path / "elsewhere")
    assert answer(library) == 7 and not os.listdir(tmp_path / "elsewhere")
    (tmp_path / "cache" / "neuronmlp").unlink()
    (tmp_path / "cache" / "neuronmlp").write_text("a file")
    assert answer(library) == 7


@pytest.mark.parametrize("value", ["", "relative", "./here"])
def test_a_cache_that_is_no_whole_path_is_not_the_current_folder(library, monkeypatch, tmp_path, value):
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(home))
    assert answer(library) == 7
    assert not os.listdir(here) and list((home / ".cache" / "neuronmlp").glob("*.so"))


def test_without_a_home_the_library_is_compiled_into_a_private_place(library, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it returns without HOME and passwd
    assert library._cache() is None
    assert answer(library) == 7


def test_a_compiler_that_hangs_is_ended_with_its_children(library, monkeypatch, tmp_path):
    compiler = tmp_path / "slow-cc"
    compiler.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/child\nwait\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(library, "LIMIT_S", 1)
    begin = time.monotonic()
    with pytest.raises(library.CompileError, match="had not finished after 1 s"):
        library.open_library(str(compiler))
    assert time.monotonic() - begin < 60
    state = pathlib.Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_library_without_the_function_is_refused(library):
    library.SOURCE.write_text("int something_else(void) { return 7; }\n")
    with pytest.raises((OSError, AttributeError)):
        answer(library)


@pytest.mark.parametrize("compiler", ["#!/bin/sh\nexit 0\n", "#!/bin/sh\necho no >&2\nexit 3\n"])
def test_a_compiler_that_fails_ends_in_a_warning(tmp_path, compiler):
    path = tmp_path / "cc"
    path.write_text(compiler)
    path.chmod(0o755)
    env = {**os.environ, "CC": str(path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", _LOAD], capture_output=True, text=True, env=env, check=False)
    assert "LOADED False" in done.stdout, done.stderr[-2000:]
    assert "could not be compiled" in done.stdout + done.stderr
