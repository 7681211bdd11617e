"""Ids of the hub's models, against a cache made by hand and no network."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

from neuronmlp_plugin.checkpoint.hub import COPIED, files_to_copy, hub_name, model_folder
from neuronmlp_plugin.cli import main
from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.reporting.folder import base_facts
from tests.letters import write_tokenizer
from tests.tiny_models import write_dense

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(home: pathlib.Path, folder: pathlib.Path, name: str = "owner/some-model") -> pathlib.Path:
    """The hub's cache `home` as its library lays it out, with `folder` as the snapshot of a model."""
    model = home / ("models--" + name.replace("/", "--"))
    snapshot = model / "snapshots" / COMMIT
    for path in (model / "blobs", model / "refs", snapshot):
        path.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, model / "blobs" / f"blob{number}")
        (snapshot / path.name).symlink_to(pathlib.Path("..", "..", "blobs", f"blob{number}"))
    return snapshot


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The snapshot of a tiny model in the cache that the hub's library looks into."""
    from huggingface_hub import constants

    dense = write_dense(tmp_path / "dense", "llama")
    write_tokenizer(dense)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cached(tmp_path / "hub", dense)


def test_an_id_is_its_snapshot_in_the_cache(hub):
    for found in (
        model_folder("owner/some-model"),
        model_folder("owner/some-model", "main"),
        model_folder("owner/some-model@main"),
        model_folder("owner/some-model", COMMIT),
    ):
        assert found.resolve() == hub.resolve()
    assert hub_name(hub) == "owner/some-model"


def test_a_folder_is_itself(tmp_path):
    assert model_folder(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="--revision main: expected the id of a model on the hub"):
        model_folder(tmp_path, "main")


@pytest.mark.parametrize("name", ["owner/another", "owner/some-model@no-such-revision"])
def test_what_the_cache_does_not_have_is_said(hub, name):
    with pytest.raises(
        CheckpointError, match="expected a local folder, or a model that the hub or its cache has"
    ):
        model_folder(name)


def test_quantize_takes_an_id(hub, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", "owner/some-model", "--out", str(out), "--quiet"]) == 0
    assert (out / "tokenizer.json").is_file() and not (out / "tokenizer.json").is_symlink()
    assert base_facts(hub)["name"] == "owner/some-model"


def test_the_base_is_named_by_where_it_was_loaded_from(tmp_path):
    folder = write_dense(tmp_path / "local", "llama")
    assert base_facts(folder)["name"] == "local"
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "owner/base"}))
    assert base_facts(folder)["name"] == "owner/base"


def test_no_pickle_and_no_code_is_asked_for():
    from neuronmlp_plugin.checkpoint import hub as module

    patterns = [*module._READ, *COPIED]
    assert not [
        pattern for pattern in patterns if pattern.endswith((".py", ".bin", ".pt", ".pth")) or pattern == "*"
    ]


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder, secret = tmp_path / "model", tmp_path / "secret"
    (folder / "additional_chat_templates").mkdir(parents=True)
    secret.write_text("a password")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (folder / "vocab.json").symlink_to("tokenizer.json")
    found = [str(path.relative_to(folder)) for path in files_to_copy(folder)]
    assert found == ["LICENSE", "additional_chat_templates/tool.jinja", "tokenizer.json", "vocab.json"]
    (folder / "tokenizer_secret").symlink_to(secret)
    with pytest.raises(
        CheckpointError, match=r"tokenizer_secret: expected a file of the model, found a link"
    ):
        files_to_copy(folder)
