"""Two processes, as torchrun starts them, make what one makes."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from neuronmlp_plugin.calibration.workers import Workers
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import UsageError
from tests.compressor.test_compress import files
from tests.conftest import ROOT, neuronmlp
from tests.letters import write_text, write_tokenizer
from tests.tiny_models import write_dense

TWO = ("--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
CLI = ("-m", "neuronmlp_plugin.cli")
SIZES = (
    "--window=32",
    "--tokens=1056",
    "--metric-tokens=288",
    "--judge-tokens=128",
)  # an odd number of windows for both passes


def compress(home: pathlib.Path, out: str, *program: str) -> pathlib.Path:
    """With one process, or with two that run `program`."""
    options = (
        "--out",
        home / out,
        "--remove=0.2",
        "--rank-multiple=1",
        "--text",
        home / "text.jsonl",
        *SIZES,
    )
    if not program:
        neuronmlp("compress", home / "dense", *options)
        return home / out
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *TWO,
        *program,
        "compress",
        home / "dense",
        *options,
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env=environment, timeout=800)
    return home / out


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dense model, its text, and what two processes make of them in `two`."""
    home = tmp_path_factory.mktemp("workers")
    write_tokenizer(write_dense(home / "dense", "llama"))
    write_text(home / "text.jsonl", 3000)
    compress(home, "two", *CLI)
    return home


def numbers(folder: pathlib.Path) -> dict[str, float]:
    return json.loads((folder / "neuronmlp_report.json").read_text())["quality"]


@pytest.mark.slow
def test_two_processes_make_the_folder_of_one(home):
    one, two = compress(home, "one"), home / "two"
    assert not list(home.glob("*.partial"))
    first, second = Checkpoint(one), Checkpoint(two)
    assert first.block.layers == second.block.layers
    for layer, specs in enumerate(first.block.layers):
        for name, spec in specs.items():
            prefix = f"model.layers.{layer}.mlp.{name}."
            pairs = {
                key: (first.tensor(key), second.tensor(key))
                for key in first.names()
                if key.startswith(prefix)
            }
            for key, (a, b) in pairs.items():
                assert a.shape == b.shape
                torch.testing.assert_close(
                    b, a, rtol=1e-2, atol=1e-3 * float(a.abs().max()), msg=f"{key} {spec}"
                )
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-3)


@pytest.mark.slow
def test_two_processes_go_on_where_one_of_them_died(home):
    for function, left in (("layer_moments", "hidden-00001-2of2"), ("layer_metrics", "gradient-00002-2of2")):
        with pytest.raises(subprocess.CalledProcessError):
            compress(home, "again", "tests/calibration/dying_worker.py", function)
        assert (home / "again.partial" / "analysis" / f"{left}.safetensors").is_file()
    assert files(compress(home, "again", *CLI)) == files(home / "two")


def test_alone_there_is_one_worker_with_everything():
    workers, windows = Workers(), torch.arange(6).reshape(3, 2)
    assert workers.count == 1 and workers.is_first
    assert torch.equal(workers.share(windows), windows)
    assert workers.own("hidden-00001") == "hidden-00001"


def test_shares_are_disjoint_and_whole_and_too_many_processes_are_refused():
    workers, windows = Workers(), torch.arange(10).reshape(5, 2)
    workers.count, shares = 3, []
    for workers.index in range(3):
        shares.append(workers.share(windows))
    assert sorted(torch.cat(shares).flatten().tolist()) == list(range(10))
    assert workers.own("hidden-00001") == "hidden-00001-3of3"
    with pytest.raises(UsageError, match="one window for each of 3 processes, found 2"):
        workers.share(windows[:2])
