"""The digest in the key of a compiled artifact changes with anything that decides what the artifact computes,
and with nothing else.
"""

import ast
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


def program() -> list[str]:
    """The files that the digest covers."""
    return sorted(
        path.relative_to(source.ROOT).as_posix()
        for pattern in source.PROGRAM
        for path in source.ROOT.glob(pattern)
    )


def imported(name: str) -> set[str]:
    """Our files that a file imports, types alone included."""
    tree = ast.parse((source.ROOT / name).read_text())
    modules = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nki_kernels")
    ]
    dotted = {
        f"{node.module}{part}"
        for node in modules
        for part in ("", *(f".{alias.name}" for alias in node.names))
    }
    files = {name.replace(".", "/").removeprefix("nki_kernels/") + ".py" for name in dotted}
    return {file for file in files if (source.ROOT / file).exists()}


def test_whatever_the_program_imports_is_part_of_it():
    """But our simulator, which `backend` takes the vendor's place with: nothing is compiled by it."""
    reached = set().union(*map(imported, (name for name in program() if name.endswith(".py"))))
    assert {name for name in reached if not name.startswith("simulator/")} <= set(program())
    kept = {"effort.py", "placement.py", "plan_file.py", "request.py", "targets.py", "tile_plan.py"}
    assert kept <= set(program())


@pytest.mark.parametrize("name", program())
def test_it_changes_with_the_program(copied, name):
    before = source_digest()
    with (copied / name).open("a") as file:
        file.write("\n")
    assert source_digest() != before


@pytest.mark.parametrize("name", ["simulator/simulation.py", "reference.py", "cases.py"])
def test_it_does_not_change_with_what_only_judges(copied, name):
    before = source_digest()
    with (copied / name).open("a") as file:
        file.write("\n")
    assert source_digest() == before
