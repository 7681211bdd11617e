"""Kill a command at a chosen moment, let something else go wrong or not, run it again, and compare the folder
with that of a run that nobody killed.

Commands run in forked processes of one that has imported everything, so that a round takes about a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import itertools
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
import traceback

import torch

from neuronmlp_plugin.checkpoint.digests import check_record
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.cli import main
from tests.letters import write_text, write_tokenizer
from tests.tiny_models import write_dense

COMMANDS = ("compress", "refine", "quantize", "convert")
LONG_AGO, FAR_AHEAD = 86_400, 4_102_444_800  # 1970 and 2100
Files = dict[str, str]  # path in the folder -> SHA-256


class Bench:
    """A model, text, and for each command its arguments; `whole` is what it writes when nobody interrupts it.

    The model is tiny, or the folder `real` has it and its text (examples/prepare_smollm2.py).
    """

    def __init__(self, home: pathlib.Path, real: pathlib.Path | None = None) -> None:
        # A forked process has none of the threads of this one's products, and would wait for them for ever.
        torch.set_num_threads(1)
        self.home = home
        self.measuring = ["--metric-tokens", "256", "--samples", "2"]
        self.tokens = "1024"
        if real is not None:
            self.tokens = "4096"  # twice its channels at least
            self.measuring += ["--allocation", "global"]  # to measure every layer would take minutes
            shutil.copytree(real / "dense", home / "dense")
            shutil.copy(real / "calibration.jsonl", home / "text.jsonl")
        else:
            write_tokenizer(write_dense(home / "dense", "llama"))
            write_text(home / "text.jsonl", 12000)
        _published(home / "published", home / "dense")
        self.whole: dict[str, Files] = {}

    def arguments(self, command: str, out: pathlib.Path) -> list[str]:
        text = ["--text", str(self.home / "text.jsonl")]
        sizes = ["--window", "32", "--tokens", self.tokens, "--judge-tokens"]
        given = {
            "compress": [str(self.home / "dense"), "--remove", "0.2", *text, *sizes, "64", *self.measuring],
            "refine": [str(self.home / "small"), "--dense", str(self.home / "dense"), *text, *sizes, "1024", "--stages", "blocks,distill"],
            "quantize": [str(self.home / "small")],
            "convert": [str(self.home / "published")],
        }  # fmt: skip
        quiet = [] if command == "convert" else ["--quiet"]
        return [command, *given[command], "--out", str(out), *quiet]

    def made(self, command: str) -> Files:
        """What the command writes when it is left alone."""
        if command not in self.whole:
            if command in ("refine", "quantize") and not (self.home / "small").exists():
                shutil.move(self.out("compress"), self.home / "small")
            self.whole[command] = files_of(self.out(command))
            shutil.rmtree(self.home / "out")
        return self.whole[command]

    def out(self, command: str) -> pathlib.Path:
        assert run(self.arguments(command, self.home / "out")) == (0, 0)
        return self.home / "out"

    def full(self, command: str, file_bytes: int) -> bool:
        """A disk on which no file grows beyond so many bytes: the command ends with a sentence, and goes on
        once there is room. Whether there was too little. Raises AssertionError as `round` does.
        """
        whole, out = self.made(command), self.home / "out"
        arguments = self.arguments(command, out)
        code, signal_number = run(arguments, file_bytes=file_bytes)
        assert signal_number == 0 and code in (0, 2), (command, file_bytes, code, signal_number)
        assert (code == 0) == out.exists(), (command, file_bytes, code)
        if command in ("quantize", "convert"):
            shutil.rmtree(self.home / "out.partial", ignore_errors=True)
        if code:
            assert run(arguments) == (0, 0), (command, "did not go on")
        assert files_of(out) == whole, (command, file_bytes)
        shutil.rmtree(out)
        return code == 2

    def round(self, command: str, *, at_file: int | None = None, after_s: float | None = None) -> bool:
        """Kill before the file `at_file` gets its name, or after some seconds; run again until it is done.
        Whether the kill came before the end. Raises AssertionError where something was lost, or is plausible
        and wrong.
        """
        whole, out = self.made(command), self.home / "out"
        arguments = self.arguments(command, out)
        code, signal_number = run(arguments, at_file, after_s)
        assert signal_number in (0, signal.SIGKILL) and code == 0, (command, code, signal_number)
        if out.exists():
            Checkpoint(out)
            check_record(out)
        elif command in ("quantize", "convert") and (self.home / "out.partial").exists():
            assert run(arguments)[0] == 2  # it says that something unfinished is there
            shutil.rmtree(self.home / "out.partial")
        if not out.exists():
            assert run(arguments) == (0, 0), (command, "did not go on")
        assert files_of(out) == whole, (command, at_file, after_s)
        shutil.rmtree(out)
        shutil.rmtree(self.home / "out.partial", ignore_errors=True)
        return signal_number != 0

    def disturbed(self, command: str, at_file: int, what: str) -> bool:
        """Killed before a file, and before the command is run again

        * `clock`: the files of the run are of 1970 and 2100, and the clock goes backwards,
        * `power`: the two newest files are cut to half,
        * `source`: the weights that it reads are others,
        * `read-only`: nobody may write in any folder of the run.

        Whether it went on; if not it said so, and the same command does after that was put right. Raises
        AssertionError as `round` does.
        """
        whole, out = self.made(command), self.home / "out"
        arguments, partial = self.arguments(command, out), self.home / "out.partial"
        assert run(arguments, at_file) == (0, signal.SIGKILL) and not out.exists(), (command, at_file)
        folders = [self.home, *(path for path in partial.rglob("*") if path.is_dir()), partial]
        source = next(pathlib.Path(arguments[1]).glob("*.safetensors"))
        kept, times = source.read_bytes(), source.stat()
        if what == "clock":
            for path, then in zip(_newest(partial), itertools.cycle((LONG_AGO, FAR_AHEAD)), strict=False):
                os.utime(path, (then, then))
        elif what == "power":
            for path in _newest(partial)[:2]:
                os.truncate(path, path.stat().st_size // 2)
        elif what == "source":
            source.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        else:
            _set_modes(folders, 0o555)
        ended = run(arguments, backwards=what == "clock", bare=what == "read-only")
        _set_modes(folders, 0o755)
        if what == "source":
            source.write_bytes(kept)
            os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
        if ended != (0, 0):
            assert ended == (2, 0) and not out.exists(), (command, what, ended)
            if what == "power" or command in ("quantize", "convert"):
                shutil.rmtree(partial)
            assert run(arguments) == (0, 0), (command, what, "did not go on")
        assert files_of(out) == whole, (command, at_file, what)
        shutil.rmtree(out)
        return ended == (0, 0)


def files_of(folder: pathlib.Path) -> Files:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(
    arguments: list[str],
    at_file: int | None = None,
    after_s: float | None = None,
    file_bytes: int | None = None,
    backwards: bool = False,
    bare: bool = False,
) -> tuple[int, int]:
    """Exit code and signal of a command in a process of its own; under a clock that goes backwards, or
    without the rights of root (`bare`).
    """
    child = os.fork()
    if not child:
        code = 70
        try:
            _kill_self_before(at_file)
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
            if backwards:
                time.time = map(float, itertools.count(FAR_AHEAD, -1000)).__next__
            if bare:
                _give_up_rights()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                code = main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)  # nobody has waited for it yet, so the number is still its own
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0, os.WTERMSIG(status) if os.WIFSIGNALED(
        status
    ) else 0


def _newest(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_mtime_ns)


def _set_modes(folders: list[pathlib.Path], mode: int) -> None:
    for folder in folders:
        if folder.exists():
            folder.chmod(mode)


def _give_up_rights() -> None:
    """All of root's capabilities: it may then write no more than the modes of its files say (capset(2))."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


def _kill_self_before(file: int | None) -> None:
    """Have this process killed before the renaming of so many files: a stage is done when its file has its
    name.
    """
    seen: list[object] = []
    for name in ("replace", "rename"):
        real = getattr(pathlib.Path, name)

        def counted(self: pathlib.Path, target: pathlib.Path, real=real) -> pathlib.Path:
            seen.append(target)
            if file is not None and len(seen) > file:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, target)

        setattr(pathlib.Path, name, counted)


def _published(folder: pathlib.Path, dense: pathlib.Path) -> None:
    """The layout that `convert` reads, with halved ranks."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(dense, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".mlp." in name]:
        u, s, v = torch.linalg.svd(tensors.pop(name), full_matrices=False)
        stem = name.removesuffix("_proj.weight")
        tensors[f"{stem}_v_proj.weight"] = v[:40].contiguous()
        tensors[f"{stem}_u_proj.weight"] = (u * s)[:, :40].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
