"""The examples for trn1 run here on the real vllm-neuron in CPU mode; the smoke test's verdict depends on
every single sequence.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.serving.trainium.dispatch import Decision, DispatchRecord
from neuronmlp_plugin.serving.trainium.sharding import FLOATING
from tests.serving.trainium import test_vllm_neuron
from tests.serving.trainium.test_vllm_neuron import environment, greedy, neuron_config  # noqa: F401  (a fixture)
from tests.tiny_models import write_dense

ROOT = pathlib.Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "trn1"
needs_stack = test_vllm_neuron.pytestmark


def smoke_test_module():
    spec = importlib.util.spec_from_file_location("smoke_test", EXAMPLES / "smoke_test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_dense(tmp_path_factory.mktemp("smoke") / "dense", "llama"))


def test_the_references_own_tokens_have_no_gap(model):
    assert smoke_test_module().worst_gap(model, [5, 6, 7], greedy(model, [5, 6, 7], 5)) == 0.0


def test_one_wrong_token_shows(model):
    new = greedy(model, [5, 6, 7], 5)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, *new[:2]]])).logits[0, -1]
    new[2] = int(logits.argmin())
    assert smoke_test_module().worst_gap(model, [5, 6, 7], new[:3]) == pytest.approx(
        float(logits.max() - logits.min())
    )


def test_every_way_that_layers_took_has_a_line():
    record = DispatchRecord()
    for layer, weights in enumerate(("int8", "int8", FLOATING)):
        record.add(layer, "decode", 1, Decision("kernel", "it fits", weights))
    assert smoke_test_module().paths(json.loads(json.dumps(record.totals()))["layers"]) == [
        "decode: 1 MLP layers by kernel, floating point weights (it fits)",
        "decode: 2 MLP layers by kernel, int8 weights (it fits)",
    ]


def run_example(
    script: str,
    model: pathlib.Path,
    environment: dict[str, str],  # noqa: F811
    *arguments: str,
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / script), str(model), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.nxdi
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.smollm2
@needs_stack[-1]
def test_the_smoke_test_passes_in_cpu_mode_and_names_the_path(smollm2_compressed, environment):  # noqa: F811
    config = json.dumps(neuron_config())
    arguments = (
        "--dtype",
        "float32",
        "--max-model-len",
        "64",
        "--max-tokens",
        "8",
        "--additional-config",
        config,
    )
    done = run_example("smoke_test.py", smollm2_compressed, environment, *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "verdict: PASS, 8 of 8 sequences agree" in done.stdout
    layers = json.loads((smollm2_compressed / "config.json").read_text())["num_hidden_layers"]
    by_torch = "MLP layers by torch, floating point weights (NxDI runs on the CPU (on_cpu))"
    assert f"decode: {layers} {by_torch}" in done.stdout


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or importlib.util.find_spec("vllm_neuron") is not None,
    reason="needs a CPU's vLLM",
)
def test_the_smoke_test_itself_works_on_a_cpus_vllm(smollm2_compressed):
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}  # noqa: F811
    arguments = ("--dtype", "float32", "--max-model-len", "64", "--max-tokens", "8", "--enforce-eager")
    done = run_example("smoke_test.py", smollm2_compressed, environment, *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "verdict: PASS, 8 of 8 sequences agree" in done.stdout
