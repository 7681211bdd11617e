"""A model's folder, from a path or from the id of a model on the Hugging Face hub.

The hub's own library does the fetching, with its cache and its offline mode (HF_HUB_OFFLINE). Only what is
read here is asked for: no pickled weights and no code.
"""

from __future__ import annotations

import os
import pathlib
import re

from neuronmlp_plugin.checkpoint.files import read_config, refuse_pointer
from neuronmlp_plugin.errors import CheckpointError, reason_of
from neuronmlp_plugin.models.families import check_supported

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Tokenizer and generation files, and the licence that goes with the weights: copied into every folder made.
COPIED = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "additional_chat_templates/*",
    "tekken.json",
    *("LICENSE*", "LICENCE*", "License*", "license*", "COPYING*", "USE_POLICY*", "NOTICE*", "Notice*"),
)
_READ = (
    "config.json",
    "README.md",
    "*.safetensors",
    "model.safetensors.index.json",
    "neuronmlp_report.json",
    "neuronmlp_digests.json",
)


def is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


def model_folder(name: str | pathlib.Path, revision: str | None = None) -> pathlib.Path:
    """The local folder of `name`: itself where it exists, else a snapshot of the hub's model of that id.

    `revision` is a branch, tag or commit of the hub; `owner/model@revision` says the same. Raises
    CheckpointError where there is neither folder nor model.
    """
    path = pathlib.Path(os.path.expanduser(name))
    is_there = os.path.exists(path)  # pathlib's own raises where a name is too long, or a folder closed
    if not is_there and "@" in str(name) and revision is None:
        name, _, revision = str(name).rpartition("@")
    if is_there or not is_hub_id(str(name)):
        if revision is not None:
            raise CheckpointError(
                f"--revision {revision}: expected the id of a model on the hub (owner/model), found {name}; "
                "leave it out."
            )
        return path
    from huggingface_hub import snapshot_download

    at = f"@{revision}" if revision else ""
    try:
        return pathlib.Path(snapshot_download(str(name), revision=revision, allow_patterns=[*_READ, *COPIED]))
    except Exception as error:  # the network's, the hub's and the cache's own errors, of many kinds
        raise CheckpointError(
            f"{name}{at}: expected a local folder, or a model that the hub or its cache has, found neither: "
            f"{reason_of(error)}; check the name."
        ) from error


def known_folder(name: str | pathlib.Path, revision: str | None = None) -> pathlib.Path:
    """`model_folder`, refused where no model that we know lies there: what is wrong with MODEL is said before
    anything else is. Raises CheckpointError, UnsupportedModelError.
    """
    folder = model_folder(name, revision)
    if not os.path.exists(folder):
        raise CheckpointError(
            f"{name}: expected a model's folder, or its id on the hub (owner/model), found no such path; "
            "check the name."
        )
    check_supported(read_config(folder), str(folder / "config.json"))
    return folder


def hub_name(folder: pathlib.Path) -> str | None:
    """`owner/model` of a folder inside the hub's cache; None for any other."""
    cached = [part for part in folder.absolute().parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/", 1) if cached else None


def files_to_copy(folder: pathlib.Path) -> list[pathlib.Path]:
    """The regular files of `folder` that COPIED names, each of which can be read.

    A link is followed inside the folder, to where its config lies (a folder may be made of links), or into
    the blobs of a hub cache. Any other could bring a file into the output that its maker was never to see:
    CheckpointError.
    """
    homes = (folder.resolve(), (folder / "config.json").resolve().parent)
    found = sorted({path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()})
    for path in found:
        target = path.resolve()
        if not (_is_blob(target) or any(target.is_relative_to(home) for home in homes)):
            raise CheckpointError(
                f"{path}: expected a file of the model, found a link to {target}; put a copy in its place."
            )
        try:
            with path.open("rb") as file:
                refuse_pointer(path, file.read(32))
        except OSError as error:
            raise CheckpointError(
                f"{path}: expected a readable file, found: {reason_of(error)}; change its mode or owner."
            ) from error
    return found


def _is_blob(path: pathlib.Path) -> bool:
    """Whether a file lies where the hub's library keeps the contents of a model's files."""
    return path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")
