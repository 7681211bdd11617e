"""A tokenizer's chat template, which is a program that came with the model: it runs in a process of its own,
with bounds on its time and its memory.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import resource
import time
from multiprocessing.connection import Connection
from typing import Any

from neuronmlp_plugin.errors import CalibrationError, reason_of

LIMIT_S = 10.0  # for one chat, which takes a millisecond
LIMIT_BYTES = 1 << 30  # beyond what this process has
MOST_CHARACTERS = 1 << 26


class ChatTemplate:
    """Renders chats in a forked process, which begins with the first and ends with this object."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.connection: Connection | None = None

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The text of a chat; `options` are those of `apply_chat_template`. Raises CalibrationError, whose
        message says only what was found: the caller knows where the chat stands.
        """
        if self.connection is None:
            self._start()
        assert self.connection is not None
        with contextlib.suppress(EOFError, OSError):  # it died: of its limits, if of nothing else
            self.connection.send((messages, options))
            if self.connection.poll(LIMIT_S):
                is_text, said = self.connection.recv()
                if is_text:
                    return said
                raise CalibrationError(said)
        self._stop()
        raise CalibrationError(
            f"a template that did not end in {LIMIT_S:g} s or in {LIMIT_BYTES >> 30} GiB of memory"
        )

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(self.tokenizer, theirs, self.connection), daemon=True
        )
        self.process.start()
        theirs.close()

    def _stop(self) -> None:
        self.process.kill()
        self.process.join()
        assert self.connection is not None
        self.connection.close()
        self.connection = None


def _serve(tokenizer: Any, connection: Connection, other_end: Connection) -> None:
    """Answer until the other end is closed, which this process has a copy of."""
    other_end.close()
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _limit(resource.RLIMIT_AS, used + LIMIT_BYTES)
    with contextlib.suppress(EOFError, OSError):
        while True:
            messages, options = connection.recv()
            # Should nobody be left to stop it, the system does.
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + LIMIT_S) + 1)
            connection.send(_rendered(tokenizer, messages, options))


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> tuple[bool, str]:
    """Whether it is the text, and the text or what went wrong: whatever a template raises is its own."""
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:
        return False, reason_of(error)
    if len(text) > MOST_CHARACTERS:
        return False, f"a text of {len(text):,} characters"
    return True, text
