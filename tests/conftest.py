"""Fixtures that are dear to make: tiny folders of every family, and the real SmolLM2, made once per state of
the sources.
"""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys

import pytest
from filelock import FileLock

ROOT = pathlib.Path(__file__).parent.parent


def sources_digest() -> str:
    """Changes with anything that a compression depends on, so that no test judges what older code made."""
    rooms = ("lowrank", "calibration", "models", "checkpoint", "compressor", "commands")
    files = sorted(path for room in rooms for path in (ROOT / "neuronmlp_plugin" / room).glob("*.py"))
    files += [
        ROOT / "neuronmlp_plugin" / "cli.py",
        ROOT / "examples" / "prepare_smollm2.py",
        pathlib.Path(__file__),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def neuronmlp(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "neuronmlp_plugin.cli", *map(str, arguments)], check=True, cwd=ROOT)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the test that makes the real model's statistics, minutes on one worker; tests that wait for
    it come last, and may wait.
    """
    for item in items:
        if item.get_closest_marker("large") and "large" not in config.option.markexpr:
            item.add_marker(
                pytest.mark.skip(reason="runs only where `-m large` names it; the docs say when it last did")
            )
        if item.get_closest_marker("smollm2"):
            item.add_marker(pytest.mark.timeout(3000))
    ahead = {
        "test_quality_in_the_served_form[compact-0.2]": 0,
        "test_refinement_wins_back_a_fifth_of_what_was_lost": 2,
    }
    items.sort(key=lambda item: ahead.get(item.name, 3 if item.get_closest_marker("smollm2") else 1))


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """Folder with dense/, calibration.jsonl and heldout.jsonl of the real model."""
    folder = ROOT / "build" / "smollm2"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / "smollm2.lock"):
        subprocess.run([sys.executable, "examples/prepare_smollm2.py", str(folder)], check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def compress_smollm2(smollm2: pathlib.Path):
    """Function (form, removed, allocation) -> folder of the compressed real model; the statistics are shared
    by all of them.
    """
    home = ROOT / "build" / f"compressed-{sources_digest()}"
    home.mkdir(parents=True, exist_ok=True)
    first = (
        "compact",
        0.2,
        "measured",
    )  # its run leaves the statistics; after it, test processes can make sizes side by side

    def make(form: str, removed: float, allocation: str = "measured") -> pathlib.Path:
        if (form, removed, allocation) != first:
            make(*first)
        target = home / f"{form}-{removed}-{allocation}"
        with FileLock(f"{target}.lock"):  # other test processes want the same
            if target.exists():
                return target
            text, analysis = smollm2 / "calibration.jsonl", home / "analysis"
            # Half of the default statistics: CI has little time. The README's numbers come from the
            # defaults.
            fewer = ("--tokens", 49152, "--metric-tokens", 8192, "--judge-tokens", 1024, "--samples", 0)
            size = ("--remove", removed, "--form", form, "--allocation", allocation)
            neuronmlp(
                "compress",
                smollm2 / "dense",
                "--out",
                target,
                *size,
                "--text",
                text,
                "--analysis",
                analysis,
                *fewer,
            )
        return target

    return make


@pytest.fixture(scope="session")
def smollm2_compressed(compress_smollm2) -> pathlib.Path:
    """The real model with 20 % of its MLP parameters removed, compact."""
    return compress_smollm2("compact", 0.2)
