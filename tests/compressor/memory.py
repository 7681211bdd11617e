"""Counting bytes: of live tensors inside this process, of the whole of another."""

from __future__ import annotations

import os
import re
import subprocess
import weakref
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, while they are alive; exact, and the same on
    every machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if hasattr(tensor, "untyped_storage") and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_rss_bytes(command: list[str], **options: Any) -> int:
    """Run a command to its end and return its largest resident size, mapped files included;
    CalledProcessError unless it succeeds.
    """
    child = subprocess.Popen(command, **options)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return usage.ru_maxrss * 1024


def own_memory_bytes(field: str) -> int:
    """A field of this process's status, such as RssAnon or VmHWM."""
    with open("/proc/self/status", encoding="utf-8") as status:
        found = re.search(rf"^{field}:\s+(\d+) kB", status.read(), flags=re.MULTILINE)
    assert found is not None, field
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Let this process's VmHWM begin anew."""
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as references:
        references.write("5")
