"""Every example has a test that runs it: here on tiny models, in test_smollm2.py on the real one."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT
from tests.letters import write_text, write_tokenizer
from tests.tiny_models import write_dense

RUN_BY_SMOLLM2 = {"prepare_smollm2.py", "offline_batch.py", "openai_client.py"}


def test_every_example_is_run_by_a_test():
    source = (ROOT / "tests" / "test_smollm2.py").read_text() + (ROOT / "tests" / "conftest.py").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name == "compare_methods.py" or (path.name in RUN_BY_SMOLLM2 and path.name in source), path.name


def test_compare_methods_prints_a_row_a_method(tmp_path):
    write_tokenizer(write_dense(tmp_path / "dense", "llama"))
    text, judge = write_text(tmp_path / "text.jsonl", 3000), write_text(tmp_path / "judge.jsonl", 1000, seed=1)
    command = [sys.executable, "examples/compare_methods.py", str(tmp_path / "dense"), "--calibrate", str(text), "--judge", str(judge)]
    command += ["--out", str(tmp_path / "compare"), "--remove", "0.2", "--judge-tokens", "256", "--options"]
    command += ["--rank-multiple", "1", "--window", "32", "--tokens", "1024", "--metric-tokens", "256", "--judge-tokens", "128"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert len(rows) == 4
    divergence = [float(row[-2]) for row in rows]
    assert divergence[0] > divergence[1] > divergence[2] > divergence[3]  # plain, whitened, ours as uv, ours compact
