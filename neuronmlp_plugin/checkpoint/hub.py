"""A model's folder, from a path or from the id of a model on the Hugging Face hub.

The hub's own library does the fetching, with its cache and its offline mode (HF_HUB_OFFLINE). Only what is
read here is asked for: no pickled weights and no code.
"""

from __future__ import annotations

import os
import pathlib
import re

from neuronmlp_plugin.checkpoint.files import read_config
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
    "LICENSE*",
    "NOTICE*",
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
    path = pathlib.Path(name)
    there = os.path.exists(path)  # which is no error where the name is too long
    if not there and "@" in str(name) and revision is None:
        name, _, revision = str(name).rpartition("@")
    if there or not is_hub_id(str(name)):
        if revision is not None:
            raise CheckpointError(
                f"--revision {revision}: expected a model of the hub, found the local folder {name}; leave "
                "it out."
            )
        return path
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(str(name), revision=revision, allow_patterns=[*_READ, *COPIED]))
    except Exception as error:  # the network's, the hub's and the cache's own errors, of many kinds
        raise CheckpointError(
            f"{name}: expected a local folder, or a model that the hub or its cache has, found neither: "
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
    """The regular files of `folder` that COPIED names.

    A link is followed only to where the folder's own files are: inside it, or in the hub cache's blobs. Any
    other could bring a file into the output that its maker was never to see.
    """
    home = folder.resolve()
    places = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        places.append(home.parent.parent / "blobs")
    found = sorted({path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()})
    return [path for path in found if any(path.resolve().is_relative_to(place) for place in places)]
