"""A slice of `python -m tests.fuzz`: docs/robustness.md has what a long run found."""

from __future__ import annotations

import pytest

from tests.fuzz.run import run_target
from tests.fuzz.targets import TARGETS

SLICE = 40


@pytest.mark.parametrize("name", TARGETS)
def test_wrong_inputs_are_accepted_or_refused_and_nothing_else(name):
    count = max(1, round(SLICE * TARGETS[name].share))
    found = run_target(name, 0, range(count))
    assert found.counts["accepted"] + found.counts["refused"] == count and not found.told, found.told[0]
