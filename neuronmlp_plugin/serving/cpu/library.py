"""`product.c` as a shared library in the user's cache, compiled once for a source, compiler, processor and
OpenMP runtime, and trusted only as far as it was checked.

The last 32 bytes of a file are the SHA-256 of those before: a loader of ELF never reads them, and whatever
was cut short or overwritten is compiled again. Files and their folder must belong to this user, and nobody
else may write them; links are not followed. Where no such folder can be had, the library is compiled into a
private one, every time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pathlib
import platform
import re
import signal
import stat
import subprocess
import tempfile

import torch

SOURCE = pathlib.Path(__file__).with_name("product.c")
LIMIT_S = 120  # of one compilation, which takes 2-5 s
MACHINE = "NEURONMLP_MARCH"  # which processor to compile for: what gcc takes as -march; this one by default
_DIGEST_BYTES = 32


class CompileError(Exception):
    """The library cannot be had; the message says why."""


def open_library(compiler: str) -> ctypes.CDLL:
    """The loaded library, compiled first where the cache has no good one. Raises CompileError, OSError."""
    command = [compiler, *_flags(), str(SOURCE), *_loaded_openmp()]
    texts = [path.read_bytes() for path in sorted(SOURCE.parent.glob("*.[ch]"))]
    # The processor too: -march=native makes another library of the same command, and homes are shared between
    # machines.
    key = hashlib.sha256(b"\n".join([*texts, _processor().encode(), *map(str.encode, command)])).hexdigest()[
        :16
    ]
    folder = _private_folder(_cache())
    if folder is not None:
        try:
            return _from_cache(folder / f"product-{key}.so", command)
        except OSError:  # a full disk, a file system that refuses: as if there were no cache
            pass
    with tempfile.TemporaryDirectory(prefix="neuronmlp-") as scratch:
        _compile(command, pathlib.Path(scratch) / "product.so")
        return ctypes.CDLL(os.path.join(scratch, "product.so"))


def kernels_of(compiler: str) -> str:
    """Which kernels the library runs on this processor, in words. Raises CompileError, OSError."""
    say = open_library(compiler).neuronmlp_kernels
    say.restype = ctypes.c_char_p
    words: bytes = say()
    return words.decode()


def _from_cache(library: pathlib.Path, command: list[str]) -> ctypes.CDLL:
    loaded = _load_checked(library)
    if loaded is None:
        _compile(command, library)
        loaded = _load_checked(library)
    if loaded is None:
        raise OSError(f"{library}: expected the library that was just written, found another")
    return loaded


def _cache() -> pathlib.Path | None:
    """Where caches belong: XDG_CACHE_HOME if it is a whole path (the standard has others ignored), or
    ~/.cache.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return pathlib.Path(named)
    home = os.path.expanduser("~")
    return pathlib.Path(home) / ".cache" if os.path.isabs(home) else None


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _private_folder(cache: pathlib.Path | None) -> pathlib.Path | None:
    """`neuronmlp` in the cache, made if need be; None where others could put a library there."""
    if cache is None:
        return None
    folder = cache / "neuronmlp"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except (OSError, ValueError):
        return None
    return folder if stat.S_ISDIR(status.st_mode) and _is_ours(status) else None


def _load_checked(library: pathlib.Path) -> ctypes.CDLL | None:
    """The library at this path if it is a whole regular file of ours that has the symbol, else None. It is
    loaded through the descriptor that was checked, so that nobody can exchange it in between.
    """
    try:
        # NOFOLLOW: a link may lead anywhere. NONBLOCK: to open a pipe that lies there would wait for its
        # writer.
        descriptor = os.open(library, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    loaded = _load_descriptor(descriptor, library)
    if loaded is None:
        os.close(descriptor)
    return loaded  # the descriptor stays open: to the loader its number is the library's name


def _load_descriptor(descriptor: int, library: pathlib.Path) -> ctypes.CDLL | None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not _is_ours(status):
        return None
    # A copy: the file object closes its own, and the library is to be loaded through the one that was
    # checked.
    with os.fdopen(os.dup(descriptor), "rb") as file:
        content = file.read()
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        return None
    by_descriptor = pathlib.Path(f"/proc/self/fd/{descriptor}")
    loaded = ctypes.CDLL(str(by_descriptor if by_descriptor.exists() else library))
    return loaded if hasattr(loaded, "neuronmlp_products") else None


def _compile(command: list[str], library: pathlib.Path) -> None:
    """Write the library whole, since other ranks compile it too. Raises CompileError."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch, tempfile.TemporaryFile() as words:
        output = pathlib.Path(scratch) / library.name
        # A session of its own, so that the time limit ends the compiler's children too.
        process = subprocess.Popen(
            [*command, "-o", str(output)],
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            start_new_session=True,
        )
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise CompileError(f"{command[0]} had not finished after {LIMIT_S} s") from error
        words.seek(0)
        if code or not output.is_file():
            said = words.read(4000).decode(errors="replace").strip()
            raise CompileError(said or f"{command[0]} ended with {code} and wrote no library")
        content = output.read_bytes()
        with output.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(hashlib.sha256(content).digest())
            os.fchmod(file.fileno(), 0o700)
            file.flush()
            os.fsync(file.fileno())
        output.replace(library)


def _flags() -> list[str]:
    machine = os.environ.get(MACHINE) or "native"
    return ["-O3", f"-march={machine}", "-fPIC", "-shared", "-fopenmp"]


def _loaded_openmp() -> list[str]:
    """The OpenMP library that torch brought. A second one (other packages bring theirs) would keep a second
    pool of threads, and the two pools would wait for the same cores: decoding lost all that the chains gain.
    """
    return sorted(map(str, (pathlib.Path(torch.__file__).parent / "lib").glob("libgomp*.so*")))[:1]


def _processor() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    flags = re.search(r"^(?:flags|Features)\s*:.*$", text, flags=re.MULTILINE)
    return flags[0] if flags else platform.machine()
