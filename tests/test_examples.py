"""Every example has a test that runs it: here on tiny models, in test_smollm2.py on the real one."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.letters import write_text, write_tokenizer
from tests.tiny_models import write_dense

RUN_BY_SMOLLM2 = {"prepare_smollm2.py", "offline_batch.py", "openai_client.py", "vllm_perplexity.py"}


def test_every_example_is_run_by_a_test():
    source = (ROOT / "tests" / "test_smollm2.py").read_text() + (ROOT / "tests" / "conftest.py").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name == "compare_methods.py" or (path.name in RUN_BY_SMOLLM2 and path.name in source), (
            path.name
        )


@pytest.mark.slow
def test_compare_methods_prints_a_row_a_method_and_text(tmp_path):
    write_tokenizer(write_dense(tmp_path / "dense", "llama"))
    text, judge = (
        write_text(tmp_path / "text.jsonl", 24000),
        write_text(tmp_path / "judge.jsonl", 4000, seed=1),
    )
    command = [
        sys.executable,
        "examples/compare_methods.py",
        str(tmp_path / "dense"),
        "--calibrate",
        str(text),
        "--window",
        "32",
    ]
    command += [
        "--judge",
        f"same={judge}",
        "--judge",
        f"again={judge}",
        "--out",
        str(tmp_path / "out"),
        "--judge-tokens",
        "2048",
    ]
    command += [
        "--compress-options=--rank-multiple 1 --window 32 --tokens 1024 --metric-tokens 256 --judge-tokens "
        "1024"
    ]
    command += [
        "--refine-options=--window 64 --batch 4 --tokens 16384 --judge-tokens 1024 --learning-rate 1e-3 "
        "--arithmetic float32"
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(done.stdout.splitlines()) == 1 + len(rows) == 1 + 8 * 2
    divergence = {row["method"]: float(row["kl_divergence"]) for row in rows if row["text"] == "same"}
    order = ["plain SVD", "SVD-LLM (whitened, uniform)", "training-free", "refined", "int8 dense"]
    assert sorted(order, key=divergence.__getitem__, reverse=True) == order
    sizes = {row["method"]: float(row["mlp_bytes_over_bf16"]) for row in rows}
    assert sizes["refined, int8"] < sizes["int8 dense"] < sizes["refined"] < 0.81
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert again.stdout == done.stdout and not again.stderr  # nothing is made twice
