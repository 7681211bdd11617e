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
from tests.conftest import ROOT, neuronmlp
from tests.letters import write_text, write_tokenizer
from tests.tiny_models import write_dense

TWO = ("--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
SIZES = ("--window=32", "--tokens=1056", "--metric-tokens=288", "--judge-tokens=128")  # an odd number of windows for both passes


def compress(home: pathlib.Path, out: str, *launcher: str) -> pathlib.Path:
    options = ("--out", home / out, "--remove=0.2", "--rank-multiple=1", "--text", home / "text.jsonl", *SIZES)
    if not launcher:
        neuronmlp("compress", home / "dense", *options)
        return home / out
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "neuronmlp_plugin.cli", "compress", home / "dense", *options]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env=environment, timeout=300)
    return home / out


def numbers(folder: pathlib.Path) -> dict[str, float]:
    return json.loads((folder / "neuronmlp_report.json").read_text())["quality"]


@pytest.mark.slow
def test_two_processes_make_the_folder_of_one(tmp_path):
    write_tokenizer(write_dense(tmp_path / "dense", "llama"))
    write_text(tmp_path / "text.jsonl", 3000)
    one, two = compress(tmp_path, "one"), compress(tmp_path, "two", *TWO)
    assert not list(tmp_path.glob("*.partial"))
    first, second = Checkpoint(one), Checkpoint(two)
    assert first.block.layers == second.block.layers
    for layer, specs in enumerate(first.block.layers):
        for name, spec in specs.items():
            prefix = f"model.layers.{layer}.mlp.{name}."
            pairs = {key: (first.tensor(key), second.tensor(key)) for key in first.names() if key.startswith(prefix)}
            for key, (a, b) in pairs.items():
                assert a.shape == b.shape
                torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-3 * float(a.abs().max()), msg=f"{key} {spec}")
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-3)


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
