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
# Of those 98,304 that `compress` takes by itself, on every push, and where `-m large` asks for more. The README's
# numbers come from the default.
FEWER_TOKENS, HALF_THE_TOKENS = 16384, 49152
EVERY_PUSH = ("compact", 0.1)  # form and removed share of the one size that every push compresses


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
    """Begin with the test that compresses the real model, minutes on one worker; tests that wait for it come
    last, and may wait.
    """
    for item in items:
        if item.get_closest_marker("large") and "large" not in config.option.markexpr:
            item.add_marker(
                pytest.mark.skip(reason="runs only where `-m large` names it; the docs say when it last did")
            )
        if item.get_closest_marker("smollm2"):
            item.add_marker(pytest.mark.timeout(3000))
    first = "test_quality_in_the_served_form[{}-{}]".format(*EVERY_PUSH)
    items.sort(key=lambda item: 0 if item.name == first else 2 if item.get_closest_marker("smollm2") else 1)


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
    """Function (form, removed, allocation, tokens) -> folder of the compressed real model; all of as many
    tokens share their statistics.
    """
    home = ROOT / "build" / f"compressed-{sources_digest()}"
    home.mkdir(parents=True, exist_ok=True)

    def make(
        form: str, removed: float, allocation: str = "measured", tokens: int = HALF_THE_TOKENS
    ) -> pathlib.Path:
        target, analysis = home / f"{form}-{removed}-{allocation}-{tokens}", home / f"analysis-{tokens}"
        # Other test processes want the same folder, or make others from these statistics.
        with FileLock(f"{analysis}.lock"):
            if not target.exists():
                text = ("--text", smollm2 / "calibration.jsonl", "--analysis", analysis)
                size = ("--remove", removed, "--form", form, "--allocation", allocation)
                fewer = ("--tokens", tokens, "--metric-tokens", tokens // 6, "--judge-tokens", 1024)
                neuronmlp(
                    "compress", smollm2 / "dense", "--out", target, *size, *text, *fewer, "--samples", 0
                )
        return target

    return make


@pytest.fixture(scope="session")
def smollm2_compressed(compress_smollm2) -> pathlib.Path:
    """The real model with 10 % of its MLP parameters removed, compact."""
    return compress_smollm2(*EVERY_PUSH, "global", FEWER_TOKENS)
