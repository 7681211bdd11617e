"""The real NxD Inference, in its CPU mode, gives the logits and the greedy tokens of the checkpoint's plain torch forward."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest
import torch

from neuronmlp_plugin.checkpoint.loader import load_model
from tests.serving.trainium.nxdi_cases import PROMPT_LENGTHS, Case, scheme_cases
from tests.tiny_models import FAMILIES, write_dense, write_mixed

pytestmark = [
    pytest.mark.nxdi,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("neuron_stubs", "neuronx_distributed_inference", "neuronx_distributed")),
        reason="needs the public sources of NxDI and NxD and `neuron_stubs` on PYTHONPATH (docs/trainium.md, Tests)",
    ),
]
ROOT = pathlib.Path(__file__).parents[3]


def run_cases(cases: list[Case], tp: int, work: pathlib.Path) -> dict:
    """Run all cases in one process per rank and return rank 0's results by case name."""
    cases_path, results_path = work / "cases.json", work / "results.pt"
    cases_path.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    command = [sys.executable, "-W", "ignore", "-m", "tests.serving.trainium.nxdi_worker", str(cases_path), str(results_path)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(tp):
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        if tp > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(tp), "LOCAL_RANK": str(rank)}
        log = (work / f"rank{rank}.log").open("w")
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + 300
    while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
        assert time.monotonic() < deadline, f"no result within 300 s, see {work}"
        time.sleep(0.2)
    codes = [process.poll() for process in ranks]
    for process in ranks:
        process.kill()
    logs = [(work / f"rank{rank}.log").read_text()[-3000:] for rank, code in enumerate(codes) if code]
    assert codes == [0] * tp, "\n".join(logs)
    return torch.load(results_path, weights_only=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("nxdi")
    return {family: str(write_mixed(root / f"{family}-mixed", write_dense(root / family, family))) for family in FAMILIES}


@torch.no_grad()
def assert_like_torch(results: list[tuple[torch.Tensor, torch.Tensor]], model) -> None:
    """Logits within 1e-4 in fp32 and the same greedy choice, for every sequence of the batch and every new token."""
    assert results
    for (tokens, logits), length in zip(results, PROMPT_LENGTHS, strict=False):
        expected = model(tokens[None, :-1]).logits[0, length - 1 :]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert torch.equal(expected.argmax(-1), tokens[length:])


@pytest.mark.parametrize("tp", [1, 2])
def test_every_family_scheme_and_batch_equals_the_torch_forward(tp, folders, tmp_path):
    cases = scheme_cases(folders, tp)
    results = run_cases(cases, tp, tmp_path)
    assert len(results) == len(cases) == (16 if tp == 1 else 32)
    models = {family: load_model(folder) for family, folder in folders.items()}
    for case in cases:
        try:
            assert_like_torch(results[case.name], models[case.family])
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
