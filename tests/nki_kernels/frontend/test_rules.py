"""For every rule a kernel that obeys and one that breaks it; the second is refused by that rule, at its
line.
"""

import importlib.util
import itertools
import sys

import numpy as np
import pytest

from nki_kernels.frontend import foreign
from nki_kernels.frontend.catalogue import RULES, RefusedError
from nki_kernels.frontend.verdict import check
from nki_kernels.simulator import simulate
from tests.nki_kernels.frontend import cases

_numbers = itertools.count()
ARGUMENTS = ("argument list", "module constant")  # in test_arguments.py
NEEDS_3_12 = ("type", "class parameters")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that imports a text as a module, with a stand-in for nki, and returns its kernel."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    assert foreign.provide()

    def imported(text):
        path = tmp_path / f"case{next(_numbers)}.py"
        path.write_text(cases.module(text))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module.kernel

    return imported


def X():
    return np.ones((128, 8), np.float32)


def rules_of(refusals):
    return {refusal.rule for refusal in refusals}


SOURCE = {**cases.SOURCE, **cases.SINCE_3}


@pytest.mark.parametrize("rule", SOURCE)
def test_what_obeys_is_accepted_and_what_breaks_the_rule_is_refused_by_it(rule, load):
    obeys, breaks = SOURCE[rule]
    target = "0.3" if rule in cases.SINCE_3 else "0.2"
    if rule in NEEDS_3_12 and sys.version_info < (3, 12):
        breaks = None  # Python itself refuses it
    assert check(load(obeys), (X(),), target=target) == []
    if breaks is not None:
        found = check(load(breaks), (X(),), target=target)
        assert rule in rules_of(found), found
        broken = next(refusal for refusal in found if refusal.rule == rule)
        assert broken.warns == RULES[rule].warns and broken.stage == RULES[rule].stage
        assert broken.instead and (broken.line > 0 or rule == "entry")


@pytest.mark.parametrize("rule", cases.RUNNING)
def test_what_only_a_run_shows_is_refused_while_it_runs(rule, load):
    obeys, breaks = cases.RUNNING[rule]
    assert np.array_equal(simulate(load(obeys))(X()), X())
    kernel = load(breaks)
    with pytest.raises(RefusedError) as refused:
        simulate(kernel)(X())
    (refusal,) = refused.value.refusals
    source = cases.module(breaks).splitlines()
    assert refusal.rule == rule and refusal.file == kernel.__code__.co_filename
    assert source[refusal.line - 1].strip() in breaks  # the kernel's own line, not the simulator's


def test_every_rule_has_a_case():
    assert {*SOURCE, *cases.RUNNING, *ARGUMENTS} == set(RULES)
