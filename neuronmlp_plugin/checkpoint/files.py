"""The files of a model folder, before anything is known of what is in them: JSON, and safetensors by
header.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from neuronmlp_plugin.checkpoint.schema import shard_name
from neuronmlp_plugin.errors import CheckpointError, reason_of

# Of the safetensors files of a folder, together: a model of 400 layers has headers of 1 MiB.
LONGEST_HEADER = 4 << 20
LONGEST_JSON = 8 << 20
MOST_FILES = 4097
# What a clone without Git LFS has in the place of a large file begins with this.
_POINTER = "version https://git-lfs"
# Of formats that are not read, and where a folder may have nothing else.
_OTHER_WEIGHTS = (".bin", ".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_OUR_SHARD = re.compile(r"neuronmlp-\d{5}-of-(\d{5})\.safetensors")


class Header(NamedTuple):
    """What a safetensors file says about one tensor, there called `name`; `dtype` in its own spelling
    ("BF16", "I8").
    """

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str


Headers = dict[str, Header]


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """`config.json` of a local folder, as a dict."""
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if os.path.isfile(adapter):
        raise CheckpointError(
            f"{adapter}: expected a model by itself, found an adapter, which transformers would add and "
            "other engines would not; merge it into its model (merge_and_unload of PEFT), or move it away."
        )
    if not os.path.isfile(path):
        closed = os.path.isdir(folder) and not os.access(folder, os.X_OK)
        raise CheckpointError(
            f"{path}: expected a Hugging Face config, found a folder that this user may not open; change its "
            "mode or owner."
            if closed
            else f"{path}: expected a Hugging Face config, found no such file; name the folder of a whole "
            "model."
        )
    return read_object(path)


def read_object(path: pathlib.Path, longest: int = LONGEST_JSON) -> dict[str, Any]:
    """A file of at most `longest` bytes that holds one JSON object."""
    try:
        with path.open("rb") as file:
            raw = file.read(longest + 1)
        if len(raw) > longest:
            raise CheckpointError(
                f"{path}: expected JSON of at most {longest >> 20} MiB, found more; the file is damaged, or "
                "not one of a model."
            )
        refuse_pointer(path, raw)
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: expected a readable file in UTF-8, found: {reason_of(error)}."
        ) from error
    return parse_object(text, path)


def refuse_pointer(path: pathlib.Path, beginning: bytes) -> None:
    """CheckpointError for what a clone without Git LFS has in the place of the file."""
    if beginning.startswith(_POINTER.encode()):
        raise CheckpointError(
            f"{path}: expected the file itself, found a pointer of Git LFS to it; run `git lfs pull` in its "
            "folder, or download it."
        )


def parse_object(text: str, path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found: {reason_of(error)}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def _no_number(name: str) -> None:
    """NaN and its like, which Python reads and JSON does not have."""
    raise ValueError(f"{name}, which is no number of JSON")


def _finite(text: str) -> float:
    """1e999 is a number of JSON; Python makes it infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]}, which is too large a number to compute with")
    return value


def open_safetensors(path: pathlib.Path) -> Any:
    """`safe_open`, with a truncated or foreign file refused in words."""
    try:
        _check_header(path)
        return safe_open(path, framework="pt")
    except PermissionError as error:
        raise CheckpointError(
            f"{path}: expected a file that this user may read, found it closed; change its mode or owner."
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: expected a whole safetensors file, found: {error}; copy or download it again."
        ) from error


def _check_header(path: pathlib.Path, others: int = 0) -> int:
    """Bytes of the headers of a file and of `others`; CheckpointError where that is too much."""
    with open(path, "rb") as file:
        # safetensors begins with the length of its header; whatever stands there would be allocated and
        # parsed.
        beginning = file.read(32)
    refuse_pointer(path, beginning)
    size = others + int.from_bytes(beginning[:8], "little")
    if size > LONGEST_HEADER:
        raise CheckpointError(
            f"{path}: expected headers of at most {LONGEST_HEADER >> 20} MiB, found {size:,} bytes; the file "
            "is damaged, or not safetensors."
        )
    return size


def read_headers(path: pathlib.Path) -> Headers:
    """Every tensor of one file, by name."""
    with open_safetensors(path) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}
        return {
            name: Header(path, name, tuple(part.get_shape()), part.get_dtype())
            for name, part in slices.items()
        }


def index_tensors(files: list[pathlib.Path]) -> Headers:
    index: Headers = {}
    size = 0
    for path in files:  # before any is parsed
        with contextlib.suppress(OSError):
            size = _check_header(path, size)
    for path in files:
        for name, header in read_headers(path).items():
            if name in index:
                raise CheckpointError(
                    f"{path}: expected {name} once, found it in {index[name].path.name} too; remove the "
                    "stale file."
                )
            index[name] = header
    return index


def safetensors_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that an engine may take weights from, whatever the case of their ending; no hidden ones,
    which macOS leaves beside each that it copies.
    """
    found = (path for path in folder.iterdir() if path.suffix.lower() == ".safetensors")
    return sorted(path for path in found if not path.name.startswith("."))


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder's weight files, as transformers finds them: `model.safetensors`, else those that its index
    names; else all safetensors and every shard that they count.

    An index beside `model.safetensors` is what an older save in shards left behind.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [folder / name for name in _indexed(index)]
    else:
        found = {path.name for path in safetensors_in(folder) if path.suffix == ".safetensors"}
        counts = sorted({int(match[1]) for match in map(_OUR_SHARD.fullmatch, found) if match})
        # Shards of two counts are two folders in one: of the first, one is missing or one is too many.
        named = {shard_name(i + 1, count) for count in counts[:1] for i in range(min(count, MOST_FILES))}
        files = [folder / name for name in sorted(found | named)]
    if len(files) > MOST_FILES:
        raise CheckpointError(
            f"{folder}: expected at most {MOST_FILES:,} weight files, found {len(files):,}; remove others."
        )
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        what = missing[0] if missing else "*.safetensors"
        raise CheckpointError(f"{folder}: expected {what}, found {_instead(folder, missing)}.")
    return files


def _instead(folder: pathlib.Path, missing: list[str]) -> str:
    """What a folder without weight files holds, and what to do."""
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_WEIGHTS)
    if others and not missing:
        return (
            f"{others[0]}, and such files are never read; save the model as safetensors "
            "(save_pretrained of transformers)"
        )
    count = f" ({len(missing)} are missing)" if len(missing) > 1 else ""
    return f"no such file{count}; copy or download the folder again"


def _indexed(index: pathlib.Path) -> list[str]:
    """The files that an index names, all of which lie beside it."""
    table = read_object(index).get("weight_map")
    names = (
        set(table.values())
        if isinstance(table, dict) and all(isinstance(name, str) for name in table.values())
        else set()
    )
    if not names or any(pathlib.PurePath(name).name != name or not _can_be_a_name(name) for name in names):
        raise CheckpointError(
            f"{index}: expected `weight_map`, from tensors to files of this folder, found another; download "
            "it again."
        )
    return sorted(names)


def _can_be_a_name(name: str) -> bool:
    return "\0" not in name and len(name.encode(errors="replace")) <= 255
