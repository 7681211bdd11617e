"""The findings: each function looks at one cause and says what is wrong and how to mend it, or nothing.
The last ones ask: the C compiler for the products of a CPU, and, without a chip, the NKI compiler whether it
would take our kernels.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from neuronmlp_plugin.doctor.environment import Environment
from neuronmlp_plugin.doctor.stacks import REFERENCE, Stack, nki_of, stack_of

PROBLEM, NOTE = "problem", "note"


@dataclasses.dataclass(frozen=True)
class Finding:
    """`problem`: the plugin, or its fast path, does not run. `note`: it does, and this is worth knowing."""

    severity: str
    what: str
    fix: str


def examine(environment: Environment) -> list[Finding]:
    """All findings, in the order in which causes hide one another."""
    return [finding for check in CHECKS for finding in check(environment)]


def check_serving_stack(env: Environment) -> Iterator[Finding]:
    if not env.has("vllm"):
        yield Finding(
            PROBLEM,
            "there is no vLLM to serve with",
            "on a CPU: pip install neuronmlp[cpu]; on Trainium: use the AWS image's own venv",
        )
    elif "vllm" not in env.versions:
        fix = "scripts/install adds the missing metadata; or run python -m vllm.entrypoints.openai.api_server"
        yield Finding(
            PROBLEM, "vLLM has no package metadata under the name `vllm`, which `vllm serve` asks for", fix
        )
    new = env.version("vllm-neuron")
    if new and new[:2] >= (0, 21):
        fix = f"use SDK {REFERENCE.sdk} on trn1 (docs/trainium.md)"
        yield Finding(
            PROBLEM,
            f"vllm-neuron {env.versions['vllm-neuron']} has its own models instead of NxD Inference, which "
            "we do not extend",
            fix,
        )
    elif new and not env.has("neuronx_distributed_inference"):
        yield Finding(
            PROBLEM,
            "vllm-neuron is here, NxD Inference is not",
            "activate the AWS image's inference venv, or install its version for your SDK",
        )


def check_registration(env: Environment) -> Iterator[Finding]:
    if "neuronmlp" not in env.plugins.get("vllm.general_plugins", ()):
        yield Finding(
            PROBLEM,
            "vLLM cannot see the plugin (no entry point `neuronmlp`)",
            "pip install neuronmlp into the venv that runs vLLM",
        )
    wanted = env.variables.get("VLLM_PLUGINS")
    needed = ["neuronmlp"] + (["neuron"] if env.has("vllm_neuron") else [])
    missing = [name for name in needed if wanted is not None and name not in wanted.split(",")]
    if missing:
        yield Finding(
            PROBLEM,
            f"VLLM_PLUGINS={wanted} filters out {', '.join(missing)}",
            f"unset it, or export VLLM_PLUGINS={','.join(reversed(needed))}",
        )
    platforms = env.plugins.get("vllm.platform_plugins", ())
    if len(platforms) > 1:
        yield Finding(
            PROBLEM,
            f"vLLM allows one platform plugin, found {', '.join(platforms)}",
            "uninstall all but vllm-neuron",
        )


def check_devices(env: Environment) -> Iterator[Finding]:
    if env.has("vllm_neuron") and not env.devices:
        fix = (
            "run on a trn1 instance with the Neuron driver (neuron-ls lists the devices); inside a container "
            "pass --device=/dev/neuron0"
        )
        yield Finding(PROBLEM, "there is no /dev/neuron*, so vllm-neuron will not register its platform", fix)


def check_versions(env: Environment) -> Iterator[Finding]:
    if not any(env.has(module) for module in ("neuronx_distributed_inference", "neuronxcc", "nki")):
        return
    stack = stack_of(env.versions)
    if stack is None:
        found = ", ".join(
            f"{name} {env.versions[name]}" for name in REFERENCE.versions if name in env.versions
        )
        fix = f"install the set of SDK {REFERENCE.sdk} (docs/trainium.md)"
        yield Finding(
            PROBLEM, f"{found or 'the Neuron packages'}: of no SDK that we know (2.26 to 2.33)", fix
        )
        return
    yield from _mismatches(env, stack)
    if not stack.kernels:
        severity = PROBLEM if env.instance.startswith(("trn1", "inf2")) or not stack.serves else NOTE
        yield Finding(
            severity,
            f"SDK {stack.sdk}: {stack.remark}",
            f"for the NKI kernels on trn1 use SDK {REFERENCE.sdk}; on others see docs/trainium.md",
        )


def _mismatches(env: Environment, stack: Stack) -> Iterator[Finding]:
    for name, wanted in stack.versions.items():
        found = env.versions.get(name)
        if found is not None and not stack.matches(name, found):
            fix = f"install {name} {wanted}.*, or another SDK as a whole; mixed sets are untested"
            what = f"{name} {found} does not belong to SDK {stack.sdk}, which the others are from"
            yield Finding(PROBLEM, what, fix)


def check_artifacts(env: Environment) -> Iterator[Finding]:
    if not env.has("neuronx_distributed_inference"):
        return
    folder = env.variables.get("NEURON_COMPILED_ARTIFACTS")
    if folder is None:
        fix = "export NEURON_COMPILED_ARTIFACTS=<folder of its own for each model and set of options>"
        what = "vllm-neuron deletes its compiled artifacts at each start and compiles again"
        yield Finding(NOTE, what, fix)
    elif pathlib.Path(folder, "neuron_config.json").is_file():
        what = (
            f"what was compiled into {folder} is in force: another model, other sizes or other options of "
            "ours are refused, NxD Inference's own options of the command line are ignored"
        )
        yield Finding(NOTE, what, "name another folder after changing the model, its factors or an option")


def check_sampling(env: Environment) -> Iterator[Finding]:
    if not env.has("neuronx_distributed_inference"):
        return
    off = env.variables.get("NEURON_ON_DEVICE_SAMPLING_DISABLED", "0") not in ("", "0")
    if off and (env.version("vllm-neuron") or (0, 2))[:2] <= (0, 5):
        what = (
            "NEURON_ON_DEVICE_SAMPLING_DISABLED makes vllm-neuron to 0.5.0 call a module and fail (its pull "
            "request 28)"
        )
        fix = 'unset it and put "on_device_sampling_config": null into override_neuron_config'
        yield Finding(PROBLEM, what, fix)
    yield Finding(
        NOTE,
        "on-device sampling gave wrong text for Qwen2 and Qwen3 at tensor parallel 2 with continuous "
        "batching, with HTTP 200 (optimum-neuron pull request 886)",
        "run examples/trn1/smoke_test.py, which compares every sequence, before you serve with "
        "--max-num-seqs above 1",
    )


def check_cpu(env: Environment) -> Iterator[Finding]:
    if not _serves_on_cpu(env):
        return
    if not env.compiler:
        what = "there is no C compiler, so the products of an MLP run one by one through vLLM"
        yield Finding(PROBLEM, what, "install gcc, or name a compiler in CC")
    if "VLLM_CPU_KVCACHE_SPACE" not in env.variables:
        yield Finding(
            NOTE,
            "vLLM on a CPU takes most of the memory for its KV cache",
            "export VLLM_CPU_KVCACHE_SPACE=<GiB>",
        )


CHECKS: tuple[Callable[[Environment], Iterator[Finding]], ...] = (
    check_serving_stack,
    check_registration,
    check_devices,
    check_versions,
    check_artifacts,
    check_sampling,
    check_cpu,
)


def ask_c_compiler(env: Environment) -> tuple[str, list[Finding]]:
    """Which compiled products vLLM on this CPU will run, in words, and what keeps them from being had. The
    library is compiled where the cache has none, as a server would at its start. Empty where no CPU serves.
    """
    if not _serves_on_cpu(env):
        return "", []
    if not env.compiler:
        return "none: there is no C compiler", []  # the finding is `check_cpu`'s
    from neuronmlp_plugin.serving.cpu.library import CompileError, kernels_of

    try:
        return kernels_of(env.compiler), []
    except (CompileError, OSError, AttributeError) as error:
        said = " ".join(str(error).split())[:300]
        what = (
            f"{env.compiler} cannot make the products of an MLP ({said}), so they run one by one through vLLM"
        )
        fix = "install a recent gcc (with OpenMP), or name another compiler in CC"
        return "none: they do not compile", [Finding(PROBLEM, what, fix)]


def verdict(env: Environment, findings: list[Finding]) -> str:
    """All of it in one sentence."""
    problems = sum(finding.severity == PROBLEM for finding in findings)
    if problems:
        return f"not ready: {problems} {'problem' if problems == 1 else 'problems'} above, each with its fix"
    if _serves_on_cpu(env):
        return (
            "ready: on this CPU `vllm serve DIR` runs each compressed MLP as one compiled call, unless "
            "vLLM's own products turn out much faster when the model is loaded (docs/cpu.md)"
        )
    return "ready as far as can be seen without running it: go on with examples/trn1/smoke_test.py"


def _serves_on_cpu(env: Environment) -> bool:
    return env.has("vllm") and not env.has("vllm_neuron")


TOKENS = (1, 256)  # decode and prefill are the same program, with other loops
HIDDEN, INTERMEDIATE, RANK = 256, 512, 128


def ask_compiler(env: Environment, target: str | None = None) -> Iterator[Finding]:
    """Who read the kernel of a small MLP with every low-rank form, in bf16 and int8, and what was refused.
    Nothing where no NKI kernel could ever run.
    `target`: the version of nki that our front end stands for where there is no compiler to ask; by default
    that of the stack which is found.
    """
    if not (env.has("nki") or env.has("neuronx_distributed_inference")):
        return
    from nki_kernels.frontend.verdict import verdict
    from nki_kernels.frontend.versions import read_as

    target = target or read_as(nki_of(env.versions))
    refusals: list[str] = []
    who = ""
    for tokens, is_int8 in itertools.product(TOKENS, (False, True)):
        kernel, arguments = _launch(tokens, is_int8)
        answer = verdict(kernel, arguments, platform=_platform(env), target=target)
        who = answer.who
        refusals += [sentence for sentence in answer.refusals if sentence not in refusals]
    if not refusals:
        fix = "nothing to mend; what runs them is for the chip to show (examples/trn1/smoke_test.py)"
        yield Finding(NOTE, f"the NKI kernels are accepted by {who}", fix)
    for sentence in refusals:
        fix = 'report it, and serve with "kernels": "off" until it is mended'
        yield Finding(PROBLEM, f"the NKI kernels are refused by {who}: {sentence}", fix)


def _platform(env: Environment) -> str:
    """The target that the vendor's compiler is asked for: inf2 has the same core as trn1."""
    return env.variables.get("NEURON_PLATFORM_TARGET_OVERRIDE") or (
        "trn2" if env.instance.startswith("trn2") else "trn1"
    )


def _launch(tokens: int, is_int8: bool) -> tuple[Any, tuple[Any, ...]]:
    """A kernel with the arguments that serving would pass."""
    import ml_dtypes
    import numpy as np

    from nki_kernels.cost.launches import launch_of
    from nki_kernels.layout import Projection, int8_layout, mlp_layout
    from nki_kernels.planner import plan_launch
    from nki_kernels.request import Request
    from nki_kernels.simulator import Placeholder
    from nki_kernels.tile_plan import Plan

    compact, uv = Projection.whole("compact", RANK), Projection.whole("uv", RANK)
    layout = mlp_layout(HIDDEN, INTERMEDIATE, compact, uv, compact)
    dtype = np.dtype(ml_dtypes.bfloat16)
    request = Request(int8_layout(layout) if is_int8 else layout, tokens, dtype, norm_eps=1e-5, residual=True)
    plan = plan_launch(request)
    assert isinstance(plan, Plan), plan
    kernel, arguments = launch_of(plan, dtype)
    return kernel, tuple(
        np.zeros(value.shape, value.dtype) if isinstance(value, Placeholder) else value for value in arguments
    )
