"""Work that a model's files describe, as a chat template and the rules of a tokenizer do: it runs in a
process of its own, with bounds on its time and its memory, and nothing that it says reaches the terminal.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from neuronmlp_plugin.errors import reason_of

LIMIT_S = 10.0  # of processor time for one call, which takes a millisecond
PATIENCE = 6  # times that on the clock: other processes may have the cores
LIMIT_BYTES = 1 << 30  # beyond what this process has
# A long text may take more: a tokenizer reads a million characters in a second, and in a few hundred MB.
CHARACTERS_A_SECOND, BYTES_A_CHARACTER = 50_000, 1000


class AsideError(Exception):
    """Work that failed, or went beyond its bounds."""


class Aside:
    """Calls of `work`, in a forked process that begins with the first and ends with this object."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work = work
        self.connection: Connection | None = None

    def __call__(self, *given: Any, characters: int = 0) -> Any:
        """`work(*given)`; `characters` of text widen the bounds. Raises AsideError, which says only what
        was found: the caller knows where.
        """
        if self.connection is None:
            self._start()
        assert self.connection is not None
        limit_s = LIMIT_S + characters / CHARACTERS_A_SECOND
        with contextlib.suppress(EOFError, OSError):  # it died: of its limits, if of nothing else
            self.connection.send((given, limit_s, LIMIT_BYTES + characters * BYTES_A_CHARACTER))
            if self.connection.poll(PATIENCE * limit_s):
                is_good, said = self.connection.recv()
                if is_good:
                    return said
                raise AsideError(said)
        self._stop()
        raise AsideError(f"work that did not end in {limit_s:.3g} s or in {LIMIT_BYTES >> 30} GiB of memory")

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.work, theirs, self.connection), daemon=True)
        self.process.start()
        theirs.close()

    def _stop(self) -> None:
        self.process.kill()
        self.process.join()
        assert self.connection is not None
        self.connection.close()
        self.connection = None


def _serve(work: Callable[..., Any], connection: Connection, other_end: Connection) -> None:
    """Answer until the other end is closed, which this process has a copy of."""
    other_end.close()
    for stream in (1, 2):  # a library in Rust says a page before it raises
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # Ctrl-C reaches this process too
        while True:
            given, limit_s, limit_bytes = connection.recv()
            _limit(resource.RLIMIT_AS, used + limit_bytes)
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + limit_s))
            connection.send(_outcome(work, given))


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _outcome(work: Callable[..., Any], given: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether it is the result, and the result or what went wrong: whatever is raised is the files' doing."""
    try:
        return True, work(*given)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # libraries in Rust panic with a kind of their own
        return False, reason_of(error)
