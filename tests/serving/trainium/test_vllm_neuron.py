"""A real vLLM with the real vllm-neuron serves factored folders: offline, with a factor file over a dense
model, and over HTTP.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest
import torch

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.writer import write_factor_file
from tests.loopback import free_port
from tests.models.layers import in_int8
from tests.serving.trainium.neuron_platform import write_distribution
from tests.tiny_models import FAMILIES, grouped_layers, write_dense, write_mixed

NEEDED = ("vllm", "vllm_neuron", "neuronx_distributed_inference", "neuronx_distributed")
pytestmark = [
    pytest.mark.nxdi,
    pytest.mark.vllm,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason=f"needs {', '.join(NEEDED)} on PYTHONPATH (docs/trainium.md, Tests)",
    ),
]
ROOT = pathlib.Path(__file__).parents[3]
NEW_TOKENS = 6
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17]]


def neuron_config(**neuronmlp: str) -> dict:
    """vLLM's additional_config for NxDI's CPU mode, with our options if any."""
    override = {
        "on_cpu": True,
        "enable_bucketing": False,
        "on_device_sampling_config": None,
        "torch_dtype": "float32",
    }
    return {"override_neuron_config": {**override, **({"neuronmlp": neuronmlp} if neuronmlp else {})}}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """The entry points of vllm-neuron and of this plugin, as if both were installed."""
    paths = [str(write_distribution(tmp_path / "entry_points")), str(ROOT), os.environ.get("PYTHONPATH", "")]
    keep = {name: value for name, value in os.environ.items() if not name.startswith("NEURONMLP_")}
    return {**keep, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(
    folder: str,
    additional_config: dict,
    environment: dict[str, str],
    work: pathlib.Path,
    max_num_seqs: int = len(PROMPTS),
) -> subprocess.CompletedProcess:
    """`LLM.generate` of all prompts in a process of its own; the new tokens go to `work`/results.json."""
    llm = {
        "model": folder,
        "skip_tokenizer_init": True,
        "max_model_len": 32,
        "max_num_seqs": max_num_seqs,
        "enable_prefix_caching": False,
        "dtype": "float32",
        "additional_config": additional_config,
    }
    arguments, results = work / "arguments.json", work / "results.json"
    arguments.write_text(json.dumps({"llm": llm, "new_tokens": NEW_TOKENS, "prompts": PROMPTS}))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.serving.trainium.vllm_worker",
        str(arguments),
        str(results),
    ]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def generate(
    folder: str, additional_config: dict, environment: dict[str, str], work: pathlib.Path
) -> list[list[int]]:
    """New tokens of each prompt."""
    done = run(folder, additional_config, environment, work)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((work / "results.json").read_text())


@torch.no_grad()
def greedy(model, prompt: list[int], count: int) -> list[int]:
    row = torch.tensor([prompt])
    for _ in range(count):
        row = torch.cat((row, model(row).logits[:, -1:].argmax(-1)), dim=1)
    return row[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_offline_batch_equals_the_torch_forward(family, environment, tmp_path):
    folder = write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", family))
    dense = [greedy(load_model(tmp_path / "dense"), prompt, NEW_TOKENS) for prompt in PROMPTS]
    expected = [greedy(load_model(folder), prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert dense != expected  # or the MLPs would not matter
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    assert generate(str(folder), neuron_config(), environment, tmp_path) == expected


def test_int8_is_served_as_it_is_and_the_log_says_so(environment, tmp_path):
    layers = tuple(map(in_int8, grouped_layers(2)))
    folder = write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", "llama"), layers=layers)
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    done = run(str(folder), neuron_config(), environment, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = [greedy(load_model(folder), prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert json.loads((tmp_path / "results.json").read_text()) == expected
    said = "decode: 3 layers by torch, int8 (NxDI runs on the CPU (on_cpu)); prefill: 3 layers by torch, int8"
    assert said in done.stdout + done.stderr


def test_a_factor_file_over_a_dense_model_by_flags_alone(environment, tmp_path):
    dense = write_dense(tmp_path / "dense", "llama")
    factored = Checkpoint(write_mixed(tmp_path / "mixed", dense))
    names = factored.block.expected_tensors(only_changed=True)
    write_factor_file(
        tmp_path / "factors.safetensors", factored.block, {name: factored.tensor(name) for name in names}
    )
    expected = [greedy(load_model(factored.folder), prompt, NEW_TOKENS) for prompt in PROMPTS]
    options = neuron_config(factors=str(tmp_path / "factors.safetensors"), kernels="off")
    assert generate(str(dense), options, environment, tmp_path) == expected


def test_an_artifact_serves_the_model_and_the_sizes_it_was_compiled_for(environment, tmp_path):
    """What vllm-neuron itself does with NEURON_COMPILED_ARTIFACTS: it loads whatever lies there."""
    dense = write_dense(tmp_path / "dense", "llama")
    folder = write_mixed(tmp_path / "mixed", dense)
    sibling = write_mixed(tmp_path / "sibling", dense, seed=5)
    environment |= {
        "NEURON_COMPILED_ARTIFACTS": str(tmp_path / "artifact"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    expected = [greedy(load_model(folder), prompt, NEW_TOKENS) for prompt in PROMPTS]
    for _ in range(2):  # compiled, then loaded
        assert generate(str(folder), neuron_config(), environment, tmp_path) == expected
    other = run(str(sibling), neuron_config(), environment, tmp_path)
    assert other.returncode and f"found that of {folder}, whose weights are others" in other.stderr
    fewer = run(str(folder), neuron_config(), environment, tmp_path, max_num_seqs=2)
    assert fewer.returncode and "compiled for --max-num-seqs 2, found 3" in fewer.stderr


def test_options_beside_the_ones_that_are_read_are_refused(environment, tmp_path):
    folder = write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", "llama"))
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    beside = {**neuron_config(), "neuronmlp": {"kernels": "off"}}
    done = run(str(folder), beside, environment, tmp_path)
    assert done.returncode and "expected 'neuronmlp' inside 'override_neuron_config'" in done.stderr


@pytest.fixture
def server(smollm2_compressed, environment, tmp_path) -> Iterator[str]:
    """Address of `vllm serve` with the real compressed SmolLM2, in vLLM's usual two processes."""
    port = free_port()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(smollm2_compressed),
    ]
    command += [
        "--served-model-name",
        "smollm2",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
    ]
    command += ["--max-model-len", "128", "--max-num-seqs", "2", "--no-enable-prefix-caching"]
    command += ["--additional-config", json.dumps(neuron_config())]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}", tmp_path / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until_healthy(process: subprocess.Popen, address: str, log: pathlib.Path) -> None:
    for _ in range(900):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


@pytest.mark.slow
@pytest.mark.smollm2
def test_http_serves_the_real_model_and_says_which_path_it_took(server, smollm2_compressed):
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(smollm2_compressed), load_model(smollm2_compressed)
    prompt = "The capital of France is"
    request = {
        "model": "smollm2",
        "prompt": prompt,
        "max_tokens": 12,
        "temperature": 0,
        "return_token_ids": True,
    }
    body = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(body, timeout=300) as reply:
        choice = json.load(reply)["choices"][0]
    expected = greedy(model, tokenizer(prompt)["input_ids"], 12)
    assert choice["token_ids"] == expected
    assert choice["text"] == tokenizer.decode(expected)

    with urllib.request.urlopen(f"{server}/metrics", timeout=60) as reply:
        lines = [line for line in reply.read().decode().splitlines() if line.startswith("neuronmlp_")]
    layers = model.config.num_hidden_layers
    labels = '{path="torch",phase="%s",reason="NxDI runs on the CPU (on_cpu)",weights="floating point"}'
    assert f"neuronmlp_mlp_layers{labels % 'decode'} {layers}.0" in lines
    assert f"neuronmlp_mlp_runs_total{labels % 'prefill'} {layers}.0" in lines
    assert f"neuronmlp_mlp_runs_total{labels % 'decode'} {11 * layers}.0" in lines
    assert not any('path="kernel"' in line for line in lines)
