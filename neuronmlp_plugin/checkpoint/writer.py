"""Write a checkpoint folder (FORMAT.md): one file per layer and one for the rest, complete or not there at
all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from neuronmlp_plugin.checkpoint.digests import RECORD, record_of
from neuronmlp_plugin.checkpoint.files import read_headers, read_object
from neuronmlp_plugin.checkpoint.hub import files_to_copy
from neuronmlp_plugin.checkpoint.reader import Checkpoint, older_rope
from neuronmlp_plugin.checkpoint.schema import INDEX_FILE, QUANT_METHOD, FormatBlock, shard_name
from neuronmlp_plugin.errors import CheckpointError, OutputError, reason_of


@contextlib.contextmanager
def told_when_unwritable(path: pathlib.Path) -> Iterator[None]:
    """Turn a write that fails into an OutputError that names the file and, where the disk is full, what to
    do.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"{path}: expected room to write, found a full disk ({os.strerror(number)}); free some and "
                "run the same command again."
            ) from error
        reason = os.strerror(number) if number else error
        raise OutputError(
            f"{path}: expected a place to write to, found: {reason}; choose another."
        ) from error


def _error_number(error: OSError | SafetensorError) -> int:
    """The operating system's; safetensors has it in its text: "I/O error: ... (os error 28)"."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0


def partial_folder(target: pathlib.Path) -> pathlib.Path:
    """Where an unfinished `target` lies: beside it, so that finishing is one rename."""
    return target.parent / f"{target.name}.partial"


def check_new(target: pathlib.Path) -> None:
    """OutputError where `target` exists, be it as a link to nothing, or can be no name of a file."""
    try:
        if target.name in ("", ".."):
            raise ValueError("no name of its own")
        with contextlib.suppress(FileNotFoundError):
            os.lstat(partial_folder(target))  # whose name is longer
        os.lstat(target)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # too long, a file in the place of a folder, or a NUL in it
        shown = str(target).encode("unicode_escape").decode()[:200]
        raise OutputError(
            f"{shown}: expected a place to write to, found: {reason_of(error)}; choose another --out."
        ) from error
    raise OutputError(
        f"{target}: expected a path that does not exist yet, found one; choose another --out or remove it."
    )


@contextlib.contextmanager
def alone_in(folder: pathlib.Path) -> Iterator[None]:
    """The existing `folder` for this process alone; OutputError where another one works there.

    The lock is the operating system's: it ends with its process, however that ends.
    """
    with told_when_unwritable(folder), open(folder / "lock", "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{folder}: expected no other run at work there, found one; wait for it or choose another "
                "folder."
            ) from error
        yield


@contextlib.contextmanager
def whole_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder to fill, which becomes `target` where all went well, and is removed where not.

    Raises OutputError where `target` exists already, or something unfinished of that name: another command
    may go on from it.
    """
    check_new(target)
    partial = partial_folder(target)
    if os.path.exists(partial):
        raise OutputError(
            f"{partial}: expected no unfinished run, found one; `compress` and `refine` go on from theirs "
            "when given again, what other commands left can only be removed; or choose another --out."
        )
    with told_when_unwritable(partial):
        partial.mkdir(parents=True)
    try:
        yield partial
        move_whole(partial, target)
    finally:
        # After the move nothing has this name any more.
        shutil.rmtree(partial, ignore_errors=True)


def move_whole(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Rename a finished folder, whose files are on the disk, to where it belongs."""
    with told_when_unwritable(target):
        # First the names inside reach the disk, then the folder's: after a power cut it is whole or absent.
        sync(folder)
        folder.rename(target)
        sync(target.parent)


def save_tensors(
    path: pathlib.Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
    durable: bool = True,
) -> None:
    """Write one safetensors file whole: under a temporary name first, then renamed; where it is to be
    `durable`, once the disk has all of it, since after a power cut its name would else stand for zeros.
    """
    temporary = path.with_suffix(".tmp")
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    with told_when_unwritable(path):
        save_file(ordered, temporary, metadata={"format": "pt", **(metadata or {})})
        temporary.chmod(0o666 & ~_umask())  # safetensors 0.8 lets nobody else read what it writes
        if durable:
            sync(temporary)
        temporary.replace(path)


def sync(path: pathlib.Path) -> None:
    """Have the disk keep a file's contents, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Of this process; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def save_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON whole, as `save_tensors` does."""
    save_text(path, json.dumps(value, indent=2) + "\n")


def save_text(path: pathlib.Path, text: str) -> None:
    """Write UTF-8 whole, as `save_tensors` does; what is no Unicode (from a folder's name, say) becomes a
    question mark.
    """
    temporary = path.with_suffix(".tmp")
    with told_when_unwritable(path):
        temporary.write_text(text, encoding="utf-8", errors="replace")
        sync(temporary)
        temporary.replace(path)


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}."


def write_layer(
    folder: pathlib.Path, base: Checkpoint, index: int, factors: dict[str, torch.Tensor]
) -> pathlib.Path:
    """Write one layer: `factors` are its MLP tensors by full name, everything else comes from `base`."""
    layers = int(base.config["num_hidden_layers"])
    path = folder / shard_name(index + 1, layers + 1)
    kept = [n for n in base.names() if n.startswith(layer_prefix(index)) and ".mlp." not in n]
    save_tensors(path, {**{name: base.tensor(name) for name in kept}, **factors})
    return path


def write_rest(folder: pathlib.Path, base: Checkpoint, block: FormatBlock) -> None:
    """Write what belongs to no layer, then the tokenizer and the config: after this the folder is complete.

    Where `block.ordinary_size` says so, it is an ordinary folder of Hugging Face, without the block.
    """
    count = int(base.config["num_hidden_layers"]) + 1
    tied = bool(base.config.get("tie_word_embeddings"))
    # A dense model whose head differs from the embedding is tied no more (reader.py): what is left out here
    # is a copy.
    rest = [
        n for n in base.names() if not n.startswith("model.layers.") and not (tied and n == "lm_head.weight")
    ]
    save_tensors(folder / shard_name(count, count), {name: base.tensor(name) for name in rest})
    copy_tokenizer(base.folder, folder)
    config = portable_config(base.config)
    shards = [folder / shard_name(position + 1, count) for position in range(count)]
    if block.ordinary_size is None:
        config["quantization_config"] = block.to_json()
        save_json(folder / INDEX_FILE, _index(shards))
    else:
        config["intermediate_size"] = block.ordinary_size
        save_json(folder / "model.safetensors.index.json", _index([_ordinary(path) for path in shards]))
    save_json(folder / "config.json", config)
    write_record(folder)


def write_record(folder: pathlib.Path) -> None:
    """Record what the files of a finished folder are made of (`digests.check_record`)."""
    save_json(folder / RECORD, record_of(folder))


def _ordinary(shard: pathlib.Path) -> pathlib.Path:
    """The shard under the name that any engine looks for; what an interrupted call renamed stays so."""
    path = _ordinary_name(shard)
    if shard.is_file():
        shard.replace(path)
    return path


def _ordinary_name(shard: pathlib.Path) -> pathlib.Path:
    return shard.with_name(shard.name.replace(QUANT_METHOD, "model", 1))


def layer_file(folder: pathlib.Path, index: int, layers: int) -> pathlib.Path:
    """Where `write_layer` has put a layer of so many, or where `write_rest` has moved it."""
    path = folder / shard_name(index + 1, layers + 1)
    return path if path.is_file() else _ordinary_name(path)


def _index(shards: list[pathlib.Path]) -> dict[str, Any]:
    """Where each tensor is, in the form of Hugging Face's `*.safetensors.index.json`."""
    files: dict[str, str] = {}
    size = 0
    for path in shards:
        files |= dict.fromkeys(read_headers(path), path.name)
        with path.open("rb") as handle:  # the header's length comes first, then the header, then the tensors
            size += path.stat().st_size - 8 - int.from_bytes(handle.read(8), "little")
    return {"metadata": {"total_size": size}, "weight_map": files}


def write_factor_file(path: pathlib.Path, block: FormatBlock, tensors: dict[str, torch.Tensor]) -> None:
    """Write the MLP tensors of the changed layers alone."""
    save_tensors(path, tensors, {QUANT_METHOD: json.dumps(block.to_json())})


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the spelling of transformers 4 beside that of transformers 5."""
    older = older_rope(config)
    # Twice: first for the order of the keys, then to win over a `rope_theta` that says something else, which
    # transformers 5 would begin to go by where a `rope_scaling` is added.
    result = {**older, **config, **older}
    if "dtype" in config:
        result.setdefault("torch_dtype", config["dtype"])
    return result


def copy_tokenizer_beside_factors(source: pathlib.Path, target: pathlib.Path) -> None:
    """`copy_tokenizer` into the folder of a factor file, where the dense folder's own is one that
    transformers 4 cannot read: it is then to be named to the engine (`--tokenizer`).
    """
    settings = source / "tokenizer_config.json"
    if settings.is_file() and b"TokenizersBackend" in settings.read_bytes():
        copy_tokenizer(source, target)


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy tokenizer and generation files, with the one portable spelling of FORMAT.md."""
    copy_files(files_to_copy(source), source, target)
    settings = target / "tokenizer_config.json"
    # One that is not there, or that nobody can read, stays as it is.
    with contextlib.suppress(CheckpointError):
        values = read_object(settings)
        if values.get("tokenizer_class") == "TokenizersBackend":
            save_json(settings, {**values, "tokenizer_class": "PreTrainedTokenizerFast"})


def copy_files(paths: Iterable[pathlib.Path], source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy files of the folder `source` to their places in `target`."""
    for path in paths:
        copy = target / path.relative_to(source)
        with told_when_unwritable(copy):
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            sync(copy)
