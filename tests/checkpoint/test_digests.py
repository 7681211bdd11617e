"""What a folder's record of digests notices, and what a sampled name of weights does."""

from __future__ import annotations

import json
import os

import pytest

from neuronmlp_plugin.checkpoint.digests import RECORD, WHOLE, check_record, sampled_digest
from neuronmlp_plugin.cli import main
from neuronmlp_plugin.errors import CheckpointError
from tests.letters import write_tokenizer
from tests.tiny_models import write_dense, write_mixed

SHARD = "neuronmlp-00002-of-00004.safetensors"


@pytest.fixture
def mixed(tmp_path):
    base = write_dense(tmp_path / "dense", "llama")
    write_tokenizer(base)
    return write_mixed(tmp_path / "mixed", base)


def zero_the_end(path):
    """Zeros in the place of the last bytes, with size and time as they were."""
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-64] + bytes(64))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_whole_folder_is_told_and_every_file_of_it_is_recorded(mixed, capsys):
    recorded = json.loads((mixed / RECORD).read_text())["files"]
    assert set(recorded) == {path.name for path in mixed.iterdir()} - {RECORD}
    assert main(["inspect", str(mixed), "--verify"]) == 0
    assert f"{mixed}: {len(recorded)} files are as they were written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (zero_the_end, SHARD),
        (lambda path: path.write_text(path.read_text().replace("1e-06", "1e-05")), "config.json"),
        (lambda path: path.unlink(), "tokenizer.json"),
        (lambda path: path.write_text("{{ messages }}"), "chat_template.jinja"),
    ],
    ids=["zeros", "edited", "missing", "new"],
)
def test_another_folder_than_was_written_is_named(mixed, capsys, harm, name):
    harm(mixed / name)
    assert main(["inspect", str(mixed), "--verify"]) == 2
    assert f"{mixed / name}: expected the contents that {RECORD} records" in capsys.readouterr().err


def test_a_card_may_be_edited_and_a_folder_may_go_without_a_record(mixed, capsys):
    (mixed / "README.md").write_text("mine")
    check_record(mixed)
    (mixed / RECORD).unlink()
    assert check_record(mixed) is None
    assert main(["inspect", str(mixed), "--verify"]) == 2  # but then it cannot be verified
    assert f"{RECORD}: expected the record to compare with, found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "record",
    [
        "[]",
        "{",
        '{"record_version": 2, "files": {}}',
        '{"record_version": 1, "files": {"../../etc/passwd": {}}}',
        '{"record_version": 1, "files": {"' + "x" * 5000 + '": {}}}',
    ],
)
def test_a_record_that_is_none_is_refused(mixed, record):
    (mixed / RECORD).write_text(record)
    with pytest.raises(CheckpointError, match=RECORD):
        check_record(mixed)


def test_quantize_records_what_it_writes(mixed, tmp_path):
    before = (mixed / RECORD).read_bytes()
    assert main(["quantize", str(mixed), "--out", str(tmp_path / "int8"), "--quiet"]) == 0
    assert check_record(tmp_path / "int8") == check_record(mixed)
    assert (tmp_path / "int8" / RECORD).read_bytes() != before


def test_a_sampled_name_changes_with_the_weights_and_not_with_the_clock(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(1000))
    large.write_bytes(bytes(WHOLE + 1000))
    known = {path: sampled_digest(path) for path in (small, large)}
    for path in (small, large):
        os.utime(path, (1, 1))
        assert sampled_digest(path) == known[path]
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        assert sampled_digest(path) != known[path]
    assert known[small] != known[large]
