"""Nothing of ours talks to a network: not at import, not while a folder is made or looked at. (What vLLM does
while it serves is watched by tests/serving/engine.py, which has the same hook.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.letters import write_text, write_tokenizer
from tests.loopback import HOOK
from tests.tiny_models import write_dense

_PROGRAM = f"""{HOOK}
import json
from neuronmlp_plugin.cli import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0, arguments
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=known, check=False
    )


def test_folders_are_made_and_looked_at_without_a_network(tmp_path):
    write_tokenizer(write_dense(tmp_path / "dense", "llama"))
    write_text(tmp_path / "text.jsonl", 4000)
    sizes = [
        "--window",
        "32",
        "--tokens",
        "1024",
        "--metric-tokens",
        "128",
        "--judge-tokens",
        "64",
        "--samples",
        "2",
    ]
    dense, small, int8, text = (str(tmp_path / name) for name in ("dense", "small", "int8", "text.jsonl"))
    commands = [
        ["compress", dense, "--remove", "0.2", "--text", text, *sizes, "--out", small, "--quiet"],
        ["quantize", small, "--out", int8, "--quiet"],
        ["inspect", int8, "--verify"],
        ["report", int8],
    ]
    done = run(_PROGRAM, json.dumps(commands))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "program",
    ["socket.create_connection(('192.0.2.1', 80))", "socket.getaddrinfo('neuronmlp.invalid', 80)"],
)
def test_the_hook_would_notice(program):
    done = run(f"{HOOK}\nimport socket\n{program}")
    assert done.returncode == 1 and "a network was asked for" in done.stderr
