"""A slice of `python -m tests.faults`: docs/robustness.md has what a long run found."""

from __future__ import annotations

import pytest

from tests.faults.kills import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "at_file"),
    [("compress", 0), ("compress", 9), ("quantize", 2), ("convert", 3), ("refine", 8)],
)
def test_a_command_that_was_killed_goes_on_to_the_same_bytes(bench, command, at_file):
    assert bench.round(command, at_file=at_file)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "file_bytes"), [("compress", 4000), ("quantize", 20000), ("convert", 0)])
def test_a_command_without_room_says_so_and_goes_on_to_the_same_bytes(bench, command, file_bytes):
    assert bench.full(command, file_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "at_file", "what", "goes_on"),
    [
        ("compress", 8, "clock", True),
        ("compress", 8, "source", False),
        ("compress", 5, "power", False),
        ("refine", 3, "power", True),
        ("refine", 8, "read-only", False),
    ],
)
def test_what_happens_before_it_goes_on_is_noticed_or_does_not_matter(bench, command, at_file, what, goes_on):
    assert bench.disturbed(command, at_file, what) == goes_on
