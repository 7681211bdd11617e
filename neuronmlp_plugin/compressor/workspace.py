"""The folder of an unfinished run: what is done, and whether this run may go on from it."""

from __future__ import annotations

import json
import pathlib

import torch

from neuronmlp_plugin.checkpoint.files import open_safetensors
from neuronmlp_plugin.checkpoint.writer import save_json, save_tensors, told_when_unwritable
from neuronmlp_plugin.errors import OutputError

PLAN_FILE = "plan.json"


def refuse_anothers(path: pathlib.Path, fingerprint: str) -> None:
    """OutputError where `path` holds what a run under another fingerprint left, or what no run did: a model
    folder, say.
    """
    known = path / PLAN_FILE
    if not known.is_file() and path.is_dir() and any(path.iterdir()):
        raise OutputError(
            f"{path}: expected an empty folder, or what a run of these same settings left, found other files; name another."
        )
    if known.is_file() and json.loads(known.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
        raise OutputError(
            f"{path}: expected what a run of these same settings left, found another's; name another folder or remove it."
        )


class Workspace:
    """Results of finished stages as safetensors in the folder `path`.

    Every file is written whole or not at all, so a stage is finished exactly when its file is there. A folder
    belongs to one fingerprint: what another run left is never mixed in.
    """

    def __init__(self, path: pathlib.Path, fingerprint: str) -> None:
        refuse_anothers(path, fingerprint)
        self.path = path
        with told_when_unwritable(path):
            path.mkdir(parents=True, exist_ok=True)
        if not (
            path / PLAN_FILE
        ).is_file():  # an analysis may serve two runs at once: neither writes what is there
            save_json(path / PLAN_FILE, {"fingerprint": fingerprint})

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").is_file()

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_tensors(self.path / f"{name}.safetensors", tensors)

    def load(self, name: str) -> dict[str, torch.Tensor]:
        with open_safetensors(self.path / f"{name}.safetensors") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}

    def drop(self, name: str) -> None:
        (self.path / f"{name}.safetensors").unlink(missing_ok=True)
