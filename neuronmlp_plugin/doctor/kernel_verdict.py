"""Would the NKI compiler of this machine take our kernels? Asked without a chip, of whoever knows best
here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from neuronmlp_plugin.doctor.checks import NOTE, PROBLEM, Finding
from neuronmlp_plugin.doctor.environment import Environment
from neuronmlp_plugin.doctor.stacks import nki_of

TOKENS = (1, 256)  # decode and prefill are the same program, with other loops
HIDDEN, INTERMEDIATE, RANK = 256, 512, 128


def check_kernels(env: Environment, target: str | None = None) -> Iterator[Finding]:
    """Who read the whole MLP's kernel, and what was refused. Nothing where no NKI kernel could ever run.
    `target`: the version of nki that our front end stands for where there is no compiler to ask; by default
    that of the stack which is found.
    """
    if not (env.has("nki") or env.has("neuronx_distributed_inference")):
        return
    from nki_kernels.frontend.vendor import verdict
    from nki_kernels.frontend.versions import read_as

    target = target or read_as(nki_of(env.versions))
    refusals: list[str] = []
    who = ""
    for tokens in TOKENS:
        kernel, arguments = _launch(tokens)
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


def _launch(tokens: int) -> tuple[Any, tuple[Any, ...]]:
    """The kernel of a whole compact MLP with the arguments that serving would pass, in bf16."""
    import ml_dtypes
    import numpy as np

    from nki_kernels.cost.launches import launch_of
    from nki_kernels.layout import Projection
    from nki_kernels.plan import Plan
    from nki_kernels.planner import plan_mlp
    from nki_kernels.simulator import Placeholder

    compact = Projection.whole("compact", RANK)
    dtype = np.dtype(ml_dtypes.bfloat16)
    plan = plan_mlp(HIDDEN, INTERMEDIATE, (compact,) * 3, tokens, dtype, norm_eps=1e-5, residual=True)
    assert isinstance(plan, Plan), plan
    kernel, arguments = launch_of(plan, dtype)
    return kernel, tuple(
        np.zeros(value.shape, value.dtype) if isinstance(value, Placeholder) else value for value in arguments
    )
