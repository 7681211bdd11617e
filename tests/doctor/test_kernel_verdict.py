"""Doctor asks the vendor's compiler where there is one, and says who answered."""

import itertools
import sys
import types

import pytest

from neuronmlp_plugin.doctor.checks import NOTE, PROBLEM, TOKENS, ask_compiler
from neuronmlp_plugin.doctor.environment import Environment
from nki_kernels.frontend import verdict as verdict_module
from nki_kernels.kernels.svd_mlp import svd_mlp


def environment(*modules, instance="", variables=None, versions=None):
    return Environment(
        versions=versions or {},
        modules=modules,
        plugins={},
        variables=variables or {},
        devices=(),
        instance=instance,
    )


def test_a_machine_without_neuron_is_not_asked():
    assert list(ask_compiler(environment("vllm"))) == []


def test_without_nki_our_front_end_accepts_the_kernels():
    (finding,) = ask_compiler(environment("neuronx_distributed_inference"))
    assert finding.severity == NOTE
    assert finding.what == "the NKI kernels are accepted by our front end of nki 0.2 (no nki here)"


@pytest.mark.parametrize(
    ("nxdi", "nki"),
    [("0.7.15063", "0.2"), ("0.8.16251", "0.2"), ("0.9.17334", "0.3"), ("0.10.18399", "0.5")],
)
def test_the_front_end_reads_as_the_nki_of_the_stack_that_is_found(nxdi, nki):
    env = environment(
        "neuronx_distributed_inference", versions={"neuronx-distributed-inference": f"{nxdi}+abc"}
    )
    (finding,) = ask_compiler(env)
    assert f"our front end of nki {nki} (no nki here)" in finding.what


def test_where_python_is_traced_the_last_rules_of_syntax_are_held_to():
    env = environment("nki", versions={"nki": "0.7.0"})
    (finding,) = ask_compiler(env)
    assert "our front end of nki 0.6" in finding.what


@pytest.mark.parametrize(
    ("env", "platform"),
    [
        (environment("nki", instance="trn1.2xlarge"), "trn1"),
        (environment("nki", instance="trn2.48xlarge"), "trn2"),
        (environment("nki", variables={"NEURON_PLATFORM_TARGET_OVERRIDE": "inf2"}), "inf2"),
    ],
)
def test_the_compiler_is_asked_for_this_platform_and_its_refusal_is_a_problem(env, platform, monkeypatch):
    asked = []

    def verdict(kernel, arguments, platform, target):
        asked.append((kernel, platform, arguments[0].shape[0], arguments[1].dtype == "int8"))
        return types.SimpleNamespace(
            who="nki 0.2.0 (trn1)", refusals=("load.py:3: expecting simple variable",)
        )

    monkeypatch.setattr(verdict_module, "verdict", verdict)
    (finding,) = ask_compiler(env)
    cases = itertools.product(TOKENS, (False, True))
    assert asked == [(svd_mlp, platform, tokens, is_int8) for tokens, is_int8 in cases]
    assert finding.severity == PROBLEM
    assert finding.what == (
        "the NKI kernels are refused by nki 0.2.0 (trn1): load.py:3: expecting simple variable"
    )


def test_the_installed_compiler_reads_the_kernels_and_ours_where_it_cannot(monkeypatch):
    asked = []
    nki = types.ModuleType("nki")

    def trace(kernel, grid, platform_target):
        asked.append((kernel.__name__, platform_target))
        return types.SimpleNamespace(specialize=lambda *arguments: arguments[0].tobytes())

    nki.trace = trace
    monkeypatch.setitem(sys.modules, "nki", nki)
    monkeypatch.setattr("nki_kernels.backend.HAS_NKI", True)  # though the kernels are written against ours
    (finding,) = ask_compiler(environment("nki"))
    assert finding.severity == NOTE and "accepted by nki " in finding.what
    assert asked == [("svd_mlp", "trn1")] * 4
    del nki.trace
    (finding,) = ask_compiler(environment("nki"))
    assert (
        finding.severity == NOTE
        and "our front end of nki 0.2 (nki of unknown version has no trace)" in finding.what
    )
