"""What the files of a folder are made of: a record beside them (FORMAT.md, "The record of digests"), and
names for weights too large to be read whole.

A record tells damage. It does not tell malice: whoever may write the folder may write the record.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from neuronmlp_plugin.checkpoint.files import read_object, safetensors_in
from neuronmlp_plugin.checkpoint.hub import files_to_copy
from neuronmlp_plugin.checkpoint.schema import INDEX_FILE
from neuronmlp_plugin.errors import CheckpointError

RECORD = "neuronmlp_digests.json"
_CHUNK = 1 << 20
# Of a file that is sampled: the first bytes of every chunk, and all of a file that is no longer than WHOLE.
SAMPLE, WHOLE = 16 << 10, 16 << 20


def file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def sampled_digest(path: pathlib.Path) -> str:
    """A name for a file of weights: SHA-256 of its size and of 16 KiB of every MiB, or of all where that is
    at most 16 MiB. Another model has another name; a single weight that was edited in between the samples has
    not.
    """
    status = path.stat()
    return _sampled(path.resolve(), status.st_size, status.st_mtime_ns)


# The time is there for the cache alone: a file that was written anew is read anew.
@functools.lru_cache(maxsize=4096)
def _sampled(path: pathlib.Path, size: int, _written_ns: int) -> str:
    sha = hashlib.sha256(str(size).encode())
    length = SAMPLE if size > WHOLE else _CHUNK
    with path.open("rb") as file:
        # And the end, where an interrupted copy differs.
        for start in [*range(0, size, _CHUNK), max(0, size - length)]:
            file.seek(start)
            sha.update(file.read(length))
    return sha.hexdigest()


def record_of(folder: pathlib.Path) -> dict[str, Any]:
    """The record of every file of a finished folder from which it is loaded."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in loaded_files(folder)
    }
    return {"record_version": 1, "files": files}


def check_record(folder: pathlib.Path) -> int | None:
    """How many files are as they were recorded; None where there is no record. Raises CheckpointError."""
    if not (folder / RECORD).is_file():
        return None
    recorded = _read(folder)
    wrong = [name for name, entry in recorded.items() if not _is_as_recorded(folder / name, entry)]
    wrong += sorted({path.relative_to(folder).as_posix() for path in loaded_files(folder)} - set(recorded))
    if wrong:
        raise CheckpointError(
            f"{folder / wrong[0][:200]}: expected the contents that {RECORD} records, found others or none "
            f"({len(wrong)} of {len(recorded)} files differ); copy or make the folder again."
        )
    return len(recorded)


def verified(folders: Iterable[pathlib.Path]) -> Iterator[tuple[pathlib.Path, str]]:
    """What `check_record` finds in each folder, in words, for whoever asked to have them verified. Raises
    CheckpointError too where none of them has a record.
    """
    counts = {folder: check_record(folder) for folder in folders}
    if not any(counts.values()):
        raise CheckpointError(
            f"{next(iter(counts)) / RECORD}: expected the record to compare with, found none; copy the "
            "folder again."
        )
    for folder, count in counts.items():
        yield folder, f"{count} files are as they were written" if count else f"no {RECORD} to compare with"


def is_whole(folder: pathlib.Path) -> bool:
    """Whether a folder is there, and as it was recorded if it was."""
    try:
        check_record(folder)
    except CheckpointError:
        return False
    return folder.is_dir()


def _read(folder: pathlib.Path) -> dict[str, Any]:
    record = read_object(folder / RECORD)
    files, version = record.get("files"), record.get("record_version")
    if version != 1 or not isinstance(files, dict) or not files or not all(map(_is_inside, files)):
        raise CheckpointError(
            f"{folder / RECORD}: expected record_version 1 and digests of files of this folder, found "
            "others; remove it to go without."
        )
    return files


def _is_inside(name: str) -> bool:
    parts = pathlib.PurePosixPath(name).parts
    return bool(parts) and "\0" not in name and ".." not in parts and not name.startswith("/")


def _is_as_recorded(path: pathlib.Path, entry: Any) -> bool:
    # os.path: a name that is too long is no file, and no error.
    if not isinstance(entry, dict) or not os.path.isfile(path) or path.stat().st_size != entry.get("bytes"):
        return False
    return file_digest(path) == entry.get("sha256")


def loaded_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files from which a folder is loaded; not the report and the card, which people edit."""
    for name in ("config.json", INDEX_FILE, "model.safetensors.index.json"):
        if os.path.isfile(folder / name):
            yield folder / name
    yield from (path for path in safetensors_in(folder) if path.is_file())
    yield from files_to_copy(folder)
