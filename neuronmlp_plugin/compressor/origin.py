"""Which dense model a folder was made from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from neuronmlp_plugin.checkpoint.digests import sampled_digest
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.models.families import is_outside_mlps


def digest(value: Any) -> str:
    """A short name for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def base_digest(base: Checkpoint) -> str:
    """A name for the dense weights: config, tensor names and shapes, and samples of all files
    (`sampled_digest`).
    """
    files = [(path.name, sampled_digest(path)) for path in base.files]
    return digest([base.config, sorted((n, list(s)) for n, s in base.shapes().items()), files])


def weights_digest(base: Checkpoint) -> str:
    """`base_digest` that also changes when a file is written anew in place."""
    written = [path.stat().st_mtime_ns for path in base.files]
    return digest([base_digest(base), written])


def check_made_from(made: Checkpoint, dense: Checkpoint) -> None:
    """Refuse another dense model than the one that `made` records, or, where it records none, one with other
    tensors outside the MLPs. Raises CheckpointError.
    """
    recorded = made.block.provenance.get("base_digest") if made.block is not None else None
    if recorded is not None and recorded != base_digest(dense):
        raise CheckpointError(
            f"{dense.folder}: expected the dense model that {made.folder} was made from ({recorded!s:.40}), "
            f"found another ({base_digest(dense)}); name the right folder."
        )
    other = other_tensor(made, dense) if recorded is None else None
    if other is not None:
        raise CheckpointError(
            f"{dense.folder}: expected the dense model that {made.folder} was made from, found another "
            f"{other}; name the right folder."
        )


def other_tensor(made: Checkpoint, dense: Checkpoint) -> str | None:
    """The first tensor outside the MLPs, which no command changes, that differs between the two folders; None
    where all are the same. A dtype that holds less is rounded to.
    """
    shapes = dense.shapes()
    for name, shape in made.shapes().items():
        if not is_outside_mlps(name):
            continue
        if shapes.get(name) != shape:
            return name
        ours, theirs = made.tensor(name), dense.tensor(name)
        if not torch.equal(ours, theirs.to(ours.dtype)):
            return name
    return None
