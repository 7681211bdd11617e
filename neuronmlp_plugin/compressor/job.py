"""A run that can be interrupted: the folder that says what is done and whether this run may go on from it,
and its progress bars.
"""

from __future__ import annotations

import contextlib
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from neuronmlp_plugin.checkpoint.files import open_safetensors, read_object
from neuronmlp_plugin.checkpoint.writer import save_json, save_tensors, told_when_unwritable
from neuronmlp_plugin.errors import CheckpointError, OutputError

PLAN_FILE = "plan.json"
_PATHS = ("model", "dense", "text")  # of settings; what lies there has digests of its own
_SUM = "crc32"  # of all tensors, in a file's metadata


def apart_from_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON, for a fingerprint: the same files under another spelling of their paths (absolute,
    through a link) are the same run.
    """
    return {name: value for name, value in settings.items() if name not in _PATHS}


def refuse_anothers(path: pathlib.Path, fingerprint: str) -> None:
    """OutputError where `path` holds what a run under another fingerprint left, or what no run did: a model
    folder, say.
    """
    known = path / PLAN_FILE
    begun = known.with_suffix(".tmp").name  # what a run left that was killed while it wrote its first file
    if not known.is_file() and path.is_dir() and any(found.name != begun for found in path.iterdir()):
        raise OutputError(
            f"{path}: expected an empty folder, or what a run of these same settings left, found other "
            "files; name another."
        )
    if known.is_file() and read_object(known).get("fingerprint") != fingerprint:
        raise OutputError(
            f"{path}: expected what a run of these same settings left, found another's; name another folder "
            "or remove it."
        )


class Workspace:
    """Results of finished stages as safetensors in the folder `path`.

    Every file is written whole or not at all, so a stage is finished exactly when its file is there. A folder
    belongs to one fingerprint: what another run left is never mixed in. Files are not waited for until the
    disk has them: one that a power cut emptied has another checksum than it says, and is refused.
    """

    def __init__(self, path: pathlib.Path, fingerprint: str) -> None:
        refuse_anothers(path, fingerprint)
        self.path = path
        with told_when_unwritable(path):
            path.mkdir(parents=True, exist_ok=True)
        # An analysis may serve two runs at once: neither writes what is there.
        if not (path / PLAN_FILE).is_file():
            save_json(path / PLAN_FILE, {"fingerprint": fingerprint})

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_tensors(self._file(name), tensors, {_SUM: str(_checksum(tensors))}, durable=False)

    def load(self, name: str) -> dict[str, torch.Tensor]:
        path = self._file(name)
        with open_safetensors(path) as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}
            expected = (handle.metadata() or {}).get(_SUM)
        if expected != str(_checksum(tensors)):
            raise CheckpointError(
                f"{path}: expected what the run wrote there, found other bytes; remove the folder "
                f"{self.path} and run again."
            )
        return tensors

    def once(
        self,
        name: str,
        make: Callable[[], dict[str, Any]],
        stands: Callable[[dict[str, Any]], bool] = lambda _: True,
    ) -> dict[str, Any]:
        """What a stage came to, as JSON: what is written as `name`, where it `stands`; otherwise (not there
        yet, damaged, or about files that are gone) it is made and written down.
        """
        path = self.path / f"{name}.json"
        try:
            found = read_object(path)
        except CheckpointError:
            found = None
        if found is None or not stands(found):
            found = make()
            save_json(path, found)
        return found

    def _file(self, name: str) -> pathlib.Path:
        return self.path / f"{name}.safetensors"

    def drop(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    """Three times as fast as a digest, and meant for accidents alone: an analysis is gigabytes."""
    value = 0
    for name in sorted(tensors):
        raw = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(raw.numpy().data, zlib.crc32(name.encode(), value))
    return value


class ProgressBars:
    """One bar per stage; `quiet` shows nothing."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of `total` steps; yields the function that advances it."""
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self.console, disable=self.quiet or not self.console.is_terminal
        ) as progress:
            task = progress.add_task(name, total=total)
            yield lambda steps: progress.advance(task, steps)
            # What an earlier run had finished was never ticked.
            progress.update(task, completed=total)
        if not self.quiet and not self.console.is_terminal:
            self.console.print(f"{name}: done")
