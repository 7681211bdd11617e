"""`vllm serve` on loopback, as a tree of processes that is measured, ended or killed as one."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

from tests.conftest import ROOT
from tests.loopback import free_port
from tests.serving.engine import environment

TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A served folder. `options` are vLLM's own, on top of what a small machine needs."""

    def __init__(self, folder: pathlib.Path, log: pathlib.Path, *options: str, tp: int = 1) -> None:
        self.folder, self.log, self.tp = folder, log, tp
        self.options = ("--dtype", "float32", "--max-model-len", "512", *options)
        self.port, self.process = free_port(), None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.folder)]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--tensor-parallel-size", str(self.tp)]
        env = {**environment(self.tp), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *where, *self.options], stdout=log, stderr=log, env=env, cwd=ROOT
            )

    def wait(self, seconds: float = 600) -> None:
        """Until it answers. Raises AssertionError with its last words."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(f"no server: {self.log.read_text()[-3000:]}")

    def running(self) -> int:
        """Requests that the engine works on or holds back, by its own count."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith(names)))

    def idle(self, seconds: float = 30) -> bool:
        """Whether nothing runs any more, so long after the last answer at most."""
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def tree(self) -> list[int]:
        """The process and all its descendants, parents first."""
        children: dict[int, list[int]] = {}
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            fields = _fields(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
        found = [self.process.pid]
        for process in found:
            found += children.get(process, [])
        return found

    def memory_bytes(self) -> int:
        """Of the tree, a page shared by several counted once (PSS). Pages of files are left out: how much of a
        library is ours changes with whoever else has it open.
        """
        return sum(_pss_bytes(process) for process in self.tree())

    def processor_s(self) -> float:
        """Time on processors of all that live in the tree."""
        every = [_fields(process) for process in self.tree()]
        return sum(int(fields[11]) + int(fields[12]) for fields in every if fields) / TICKS

    def kill(self) -> None:
        """SIGKILL for all of them: nobody gets to tidy up."""
        for process in self.tree():
            os.kill(process, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ctrl-C, and SIGKILL for what is there after half a minute."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _fields(process: int) -> list[str]:
    """Of /proc/N/stat, from the state on; none where the process has ended."""
    try:
        text = pathlib.Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return text.rpartition(") ")[2].split()


def _pss_bytes(process: int) -> int:
    try:
        text = pathlib.Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    kinds = ("Pss_Anon:", "Pss_Shmem:")
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(kinds))
