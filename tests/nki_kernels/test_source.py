"""The digest in the key of a compiled artifact changes with anything that decides what the artifact computes, and with nothing else."""

import shutil

import pytest

from nki_kernels import source, source_digest


@pytest.fixture
def copied(tmp_path, monkeypatch):
    root = tmp_path / "nki_kernels"
    shutil.copytree(source.ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    before = source_digest()
    monkeypatch.setattr(source, "ROOT", root)
    assert source_digest() == before
    return root


@pytest.mark.parametrize("name", ["kernels/load.py", "kernels/svd_mlp.py", "packing.py", "planner.py", "layout.py", "tiling.py"])
def test_it_changes_with_the_program(copied, name):
    before = source_digest()
    with (copied / name).open("a") as file:
        file.write("\n")
    assert source_digest() != before


@pytest.mark.parametrize("name", ["simulator/run.py", "reference/mlp.py", "cases.py"])
def test_it_does_not_change_with_what_only_judges(copied, name):
    before = source_digest()
    with (copied / name).open("a") as file:
        file.write("\n")
    assert source_digest() == before
