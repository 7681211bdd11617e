"""The numeric examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

# Module -> its functions and classes that are shown by numbers.
SHOWN = {
    "neuronmlp_plugin.bench.parts": {"part_of"},
    "neuronmlp_plugin.lowrank.allocate": {"cost"},
    "neuronmlp_plugin.lowrank.dealing": {"deal"},
    "neuronmlp_plugin.lowrank.decompose": {"SecondMoment"},
    "neuronmlp_plugin.lowrank.pivots": {"common_order", "pivot_inputs", "pivot_outputs"},
    "neuronmlp_plugin.lowrank.removal": {"eliminate"},
    "neuronmlp_plugin.lowrank.rounding": {"refit", "round_under"},
    "neuronmlp_plugin.lowrank.slices": {"factor_outputs"},
    "neuronmlp_plugin.models.definition": {"block_product", "product"},
    "neuronmlp_plugin.models.factors": {"Matrix"},
    "neuronmlp_plugin.models.gather": {"gathered_order"},
    "nki_kernels.packing": {"pack"},
    "nki_kernels.placement": {"Room"},
    "nki_kernels.tiling": {"Matrix.blocks"},
}


@pytest.mark.parametrize("name", SHOWN)
def test_examples_give_what_they_say(name):
    module = importlib.import_module(name)
    found = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert {test.name.removeprefix(f"{name}.") for test in found} == SHOWN[name]
    assert doctest.testmod(module).failed == 0
