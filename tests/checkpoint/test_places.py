"""Where a result may be written, and by how many runs at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from neuronmlp_plugin.checkpoint.writer import alone_in, check_new
from neuronmlp_plugin.errors import OutputError


def test_a_new_path_is_one_that_nothing_lies_at(tmp_path):
    check_new(tmp_path / "new")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "dangling"):
        with pytest.raises(OutputError, match="expected a path that does not exist yet"):
            check_new(path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_path_that_can_be_no_file_is_refused_before_the_work(tmp_path, name):
    with pytest.raises(OutputError, match="expected a place to write to"):
        check_new(tmp_path / name)


def test_a_second_run_in_one_folder_is_refused_at_once(tmp_path):
    program = (
        "import pathlib, sys; from neuronmlp_plugin.checkpoint.writer import alone_in\n"
        "with alone_in(pathlib.Path(sys.argv[1])): print('alone', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "alone\n"
        with pytest.raises(OutputError, match="expected no other run at work there"), alone_in(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    with alone_in(tmp_path):  # the lock went with the process that held it
        pass
