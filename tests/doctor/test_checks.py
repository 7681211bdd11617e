"""Every cause is found, with its fix, and a sound machine is left in peace."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest

from neuronmlp_plugin import doctor
from neuronmlp_plugin.doctor.checks import NOTE, PROBLEM, ask_c_compiler, examine, verdict
from neuronmlp_plugin.doctor.environment import Environment, numbers, observe
from neuronmlp_plugin.doctor.stacks import STACKS, nki_of, stack_of
from neuronmlp_plugin.serving.cpu.library import CompileError

TRN1 = Environment(
    versions={
        "neuronmlp": "0.1.0",
        "vllm": "0.13.0",
        "vllm-neuron": "0.4.1",
        "neuronx-distributed-inference": "0.8.16251",
        "neuronx-distributed": "0.17.26814",
        "neuronx-cc": "2.23.6484.0+3b612583",
        "torch-neuronx": "2.9.0.2.12.22436+0f1dac25",
        "nki": "0.2.0+g82fdb402",
    },
    modules=("neuronmlp_plugin", "neuronx_distributed_inference", "nki", "vllm", "vllm_neuron"),
    plugins={"vllm.general_plugins": ("neuronmlp",), "vllm.platform_plugins": ("neuron",)},
    variables={"NEURON_COMPILED_ARTIFACTS": "/nonexistent/artifacts"},
    devices=("/dev/neuron0",),
    instance="trn1.2xlarge",
)
CPU = Environment(
    {"vllm": "0.32.0"},
    ("vllm",),
    {"vllm.general_plugins": ("neuronmlp",)},
    {"VLLM_CPU_KVCACHE_SPACE": "1"},
    compiler="/usr/bin/cc",
)


def change(base: Environment, **fields) -> Environment:
    return dataclasses.replace(
        base, **{n: {**getattr(base, n), **v} if isinstance(v, dict) else v for n, v in fields.items()}
    )


def problems(environment: Environment) -> list[str]:
    findings = examine(environment)
    assert all(finding.fix for finding in findings)
    return [finding.what for finding in findings if finding.severity == PROBLEM]


@pytest.mark.parametrize("environment", [TRN1, CPU], ids=["trn1", "cpu"])
def test_a_sound_machine_has_no_problem(environment):
    assert problems(environment) == []


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (Environment({}, (), {}, {}), "no vLLM"),
        (change(CPU, versions={}, plugins={"vllm.general_plugins": ()}), "no entry point"),
        (dataclasses.replace(CPU, versions={}), "no package metadata"),
        (change(TRN1, variables={"VLLM_PLUGINS": "neuron"}), "VLLM_PLUGINS=neuron filters out neuronmlp"),
        (change(TRN1, variables={"VLLM_PLUGINS": "neuronmlp"}), "VLLM_PLUGINS=neuronmlp filters out neuron"),
        (dataclasses.replace(CPU, compiler=""), "no C compiler"),
        (
            change(TRN1, plugins={"vllm.platform_plugins": ("neuron", "optimum_neuron")}),
            "one platform plugin",
        ),
        (change(TRN1, devices=()), "no /dev/neuron*"),
        (change(TRN1, versions={"vllm": "0.16.0"}), "does not belong to SDK 2.28.1"),
        (
            change(TRN1, versions={"neuronx-cc": "2.24.5133.0"}),
            "neuronx-cc 2.24.5133.0 does not belong to SDK 2.28.1",
        ),
        (
            change(TRN1, versions={"neuronx-distributed-inference": "0.8.99999"}),
            "does not belong to SDK 2.28.1",
        ),
        (
            change(
                TRN1,
                versions={
                    "neuronx-distributed-inference": "0.9.17334",
                    "nki": "0.3.0",
                    "vllm": "0.16.0",
                    "vllm-neuron": "0.5.0",
                    "neuronx-distributed": "0.18.27753",
                    "neuronx-cc": "2.24.8799.0",
                    "torch-neuronx": "2.9.0.2.13.26312",
                },
            ),
            "trn2 and later",
        ),
        (
            dataclasses.replace(TRN1, versions={"vllm": "0.9.0", "neuronx-distributed-inference": "0.5.1"}),
            "of no SDK that we know",
        ),
        (change(TRN1, versions={"vllm-neuron": "0.24.0.1.1.0"}), "its own models"),
        (change(TRN1, modules=("vllm", "vllm_neuron")), "NxD Inference is not"),
        (
            change(
                TRN1, versions={"vllm-neuron": "0.2.0"}, variables={"NEURON_ON_DEVICE_SAMPLING_DISABLED": "1"}
            ),
            "NEURON_ON_DEVICE_SAMPLING_DISABLED",
        ),
    ],
)
def test_each_cause_is_named(environment, words):
    assert any(words in what for what in problems(environment)), problems(environment)


def test_notes_about_artifacts(tmp_path):
    without = dataclasses.replace(TRN1, variables={})
    assert any("deletes its compiled artifacts" in finding.what for finding in examine(without))
    (tmp_path / "neuron_config.json").write_text("{}")
    used = change(TRN1, variables={"NEURON_COMPILED_ARTIFACTS": str(tmp_path)})
    assert any(finding.severity == NOTE and "are refused" in finding.what for finding in examine(used))


@pytest.mark.parametrize(
    ("versions", "sdk", "nki"),
    [
        ({"neuronx-distributed-inference": "0.10.18399", "nki": "0.5.0"}, "2.31.1", "0.5"),
        ({"neuronx-distributed-inference": "0.10.17970", "nki": "0.4.0"}, "2.30.0", "0.4"),
        ({"neuronx-distributed-inference": "0.10.99999", "nki": "0.5.0"}, "2.31.1", "0.5"),
        ({"neuronx-distributed-inference": "0.6.10598"}, "2.26.1", "0.2"),
        ({"neuronx-distributed-inference": "0.8.16251"}, "2.28.1", "0.2"),
        ({"nki": "0.7.0", "torch-neuronx": "2.9.0.2.15.32035"}, "2.33.0", "0.7"),
        ({"neuronx-cc": "2.27.5334.0"}, "2.32.0", "0.6"),
        ({"torch": "2.13.0"}, None, "0.2"),
    ],
)
def test_the_stack_that_is_found_names_the_nki_that_reads_the_kernels(versions, sdk, nki):
    stack = stack_of(versions)
    assert (stack.sdk if stack else None) == sdk and nki_of(versions) == nki


def test_one_sdk_alone_has_kernels_on_trn1():
    assert [stack.sdk for stack in STACKS if stack.kernels] == ["2.28.1"]
    assert [stack.sdk for stack in STACKS if not stack.serves] == ["2.32.0", "2.33.0"]


def test_versions_are_read_by_their_leading_numbers():
    assert numbers("0.8.16251+abcdef") == (0, 8, 16251)
    assert numbers("0.32.0rc1") == (0, 32)


def test_what_is_here_is_seen(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "x")
    monkeypatch.setattr("glob.glob", lambda _: ["/dev/neuron0"])
    found = observe()
    assert "neuronmlp" in found.plugins["vllm.general_plugins"] and found.variables["VLLM_PLUGINS"] == "x"
    assert found.devices == ("/dev/neuron0",) and {"torch", "neuronmlp_plugin"} <= set(found.modules)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_looks_at_this_machine(as_json, capsys):
    code = doctor.run(argparse.Namespace(json=as_json))
    printed = capsys.readouterr().out
    findings = examine(observe())
    assert code == int(any(finding.severity == PROBLEM for finding in findings))
    if as_json:
        assert [finding["what"] for finding in json.loads(printed)["findings"]] == [
            finding.what for finding in findings
        ]
    else:
        assert "python" in printed and all(finding.fix in printed for finding in findings)
        assert printed.splitlines()[-1].startswith("verdict: ")


@pytest.fixture
def libraries(monkeypatch):
    """What the C compiler of the day makes: words, or an error."""
    from neuronmlp_plugin.serving.cpu import library

    return lambda answer: monkeypatch.setattr(library, "kernels_of", answer)


def test_a_cpu_is_told_its_kernels_and_that_the_fast_path_runs(libraries):
    libraries(lambda compiler: f"AVX2 by {compiler}")
    assert ask_c_compiler(CPU) == ("AVX2 by /usr/bin/cc", [])
    assert verdict(CPU, examine(CPU)).startswith("ready: on this CPU")


def test_a_compiler_that_makes_nothing_is_a_problem(libraries):
    def fails(compiler):
        raise CompileError("omp.h: No such file\n  or directory")

    libraries(fails)
    products, (finding,) = ask_c_compiler(CPU)
    assert products == "none: they do not compile" and finding.severity == PROBLEM
    assert "/usr/bin/cc cannot make" in finding.what and "No such file or directory" in finding.what
    assert verdict(CPU, [finding]) == "not ready: 1 problem above, each with its fix"


def test_without_a_compiler_the_verdict_counts_it_once():
    without = dataclasses.replace(CPU, compiler="")
    products, found = ask_c_compiler(without)
    assert products == "none: there is no C compiler" and not found
    assert verdict(without, examine(without)).startswith("not ready: 1 problem above")


def test_no_product_of_a_cpu_is_compiled_for_trainium(libraries):
    libraries(lambda compiler: pytest.fail("nothing to compile here"))
    assert ask_c_compiler(TRN1) == ("", [])
    assert "smoke_test.py" in verdict(TRN1, [])
