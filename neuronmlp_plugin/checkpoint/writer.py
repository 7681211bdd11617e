"""Write a checkpoint folder (FORMAT.md): one file per layer and one for the rest, complete or not there at
all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file

from neuronmlp_plugin.checkpoint.reader import Checkpoint, read_headers
from neuronmlp_plugin.checkpoint.schema import QUANT_METHOD, FormatBlock, shard_name
from neuronmlp_plugin.errors import OutputError

_COPIED = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
)


@contextlib.contextmanager
def told_when_unwritable(path: pathlib.Path) -> Iterator[None]:
    """Turn a write that fails into an OutputError that names the file and, where the disk is full, what to
    do.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path}: expected a place to write to, found: {error.strerror or error}; choose another."
            ) from error
        raise OutputError(
            f"{path}: expected room to write, found a full disk; free some and run the same command again."
        ) from error
    except Exception as error:  # safetensors wraps the operating system's error in its own type
        if "No space left" not in str(error):
            raise
        raise OutputError(
            f"{path}: expected room to write, found a full disk; free some and run the same command again."
        ) from error


def partial_folder(target: pathlib.Path) -> pathlib.Path:
    """Where an unfinished `target` lies: beside it, so that finishing is one rename."""
    return target.parent / f"{target.name}.partial"


@contextlib.contextmanager
def whole_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder to fill, which becomes `target` where all went well, and is removed where not.

    Raises OutputError where `target` exists already, or something unfinished of that name: another command
    may go on from it.
    """
    if target.exists():
        raise OutputError(
            f"{target}: expected a path that does not exist yet, found one; choose another --out or remove it."
        )
    partial = partial_folder(target)
    if partial.exists():
        raise OutputError(
            f"{partial}: expected no unfinished run, found one; finish it, remove it, or choose another --out."
        )
    with told_when_unwritable(partial):
        partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_tensors(
    path: pathlib.Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write one safetensors file whole: under a temporary name first, then renamed."""
    temporary = path.with_suffix(".tmp")
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    with told_when_unwritable(path):
        save_file(ordered, temporary, metadata={"format": "pt", **(metadata or {})})
        temporary.replace(path)


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
    rest = [
        n for n in base.names() if not n.startswith("model.layers.") and not (tied and n == "lm_head.weight")
    ]
    save_tensors(folder / shard_name(count, count), {name: base.tensor(name) for name in rest})
    copy_tokenizer(base.folder, folder)
    config = portable_config(base.config)
    if block.ordinary_size is None:
        config["quantization_config"] = block.to_json()
    else:
        config["intermediate_size"] = block.ordinary_size
        _index_as_ordinary(folder, count)
    save_json(folder / "config.json", config)


def _index_as_ordinary(folder: pathlib.Path, count: int) -> None:
    """Give the shards the names that any engine looks for, and the index that goes with them. What an
    interrupted call did is not done again.
    """
    files, size = {}, 0
    for position in range(1, count + 1):
        path = folder / f"model-{position:05d}-of-{count:05d}.safetensors"
        if not path.is_file():
            (folder / shard_name(position, count)).rename(path)
        files |= dict.fromkeys(read_headers(path), path.name)
        with path.open("rb") as handle:  # the header's length comes first, then the header, then the tensors
            size += path.stat().st_size - 8 - int.from_bytes(handle.read(8), "little")
    save_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": files}
    )


def write_factor_file(path: pathlib.Path, block: FormatBlock, tensors: dict[str, torch.Tensor]) -> None:
    """Write the MLP tensors of the changed layers alone."""
    save_tensors(path, tensors, {QUANT_METHOD: json.dumps(block.to_json())})


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the spelling of transformers 4 beside that of transformers 5."""
    result = dict(config)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        result.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        result.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    if "dtype" in config:
        result.setdefault("torch_dtype", config["dtype"])
    return result


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy tokenizer and generation files, with the one portable spelling of FORMAT.md."""
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            with told_when_unwritable(target / path.name):
                shutil.copy(path, target / path.name) if path.is_file() else shutil.copytree(
                    path, target / path.name, dirs_exist_ok=True
                )
    settings = target / "tokenizer_config.json"
    if settings.is_file():
        values = json.loads(settings.read_text(encoding="utf-8"))
        if values.get("tokenizer_class") == "TokenizersBackend":
            save_json(settings, {**values, "tokenizer_class": "PreTrainedTokenizerFast"})
