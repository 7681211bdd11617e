"""What is installed is what is written down."""

from __future__ import annotations

import csv
import importlib.machinery
import importlib.util
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_has_a_hash_for_every_pinned_version_and_no_other():
    loader = importlib.machinery.SourceFileLoader("lock", str(ROOT / "scripts" / "lock"))
    lock = importlib.util.module_from_spec(importlib.util.spec_from_loader("lock", loader))
    loader.exec_module(lock)
    wanted = {(canonical(name), version) for name, version in (line.split("==") for line in lock.pinned())}
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")
    ]
    parts = [re.fullmatch(r"(\S+)==([^\s+]+)(?:\+\w+)? --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert {(canonical(part[1]), part[2]) for part in parts} == wanted


def test_licences_are_listed_for_everything_pinned():
    listed = {canonical(row["package"]) for row in csv.DictReader((ROOT / "docs" / "licences.csv").open())}
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert {canonical(line.split("==")[0]) for line in pinned if line and not line.startswith("#")} <= listed
    done = subprocess.run(
        [sys.executable, "scripts/licences"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("package,version,licence\n") and "\ntorch," in done.stdout
