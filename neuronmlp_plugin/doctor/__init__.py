"""`neuronmlp doctor`: look at this machine once, and say whether the fast path runs, or what keeps it from
running, each finding with its fix.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neuronmlp_plugin.doctor.environment import Environment


def run(args: argparse.Namespace) -> int:
    """Print what is here, all findings and a verdict (`--json` as JSON); exit code 1 if one is a problem."""
    from neuronmlp_plugin.doctor.checks import PROBLEM, ask_c_compiler, ask_compiler, examine, verdict
    from neuronmlp_plugin.doctor.environment import observe

    environment = observe()
    products, refused = ask_c_compiler(environment)
    findings = [*examine(environment), *refused, *ask_compiler(environment)]
    if args.json:
        values = {
            "environment": dataclasses.asdict(environment),
            "cpu_products": products,
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "verdict": verdict(environment, findings),
        }
        print(json.dumps(values, indent=2))
    else:
        for name, value in _rows(environment, products):
            print(f"{name:32} {value}")
        for finding in findings:
            print(f"\n{finding.severity}: {finding.what}\n  fix: {finding.fix}")
        print(f"\nverdict: {verdict(environment, findings)}")
    return int(any(finding.severity == PROBLEM for finding in findings))


def _rows(environment: Environment, products: str) -> Iterator[tuple[str, str]]:
    """What is here: versions, and in a line each what the fast path of a CPU, or of Trainium, needs."""
    from neuronmlp_plugin.doctor.stacks import nki_of, stack_of

    yield from environment.versions.items()
    if products:
        yield "C compiler", environment.compiler or "none (CC, cc and gcc were looked for)"
        yield "kernels on this CPU", products
        yield "fast path of compressed MLPs", "does not run" if products.startswith("none") else "runs"
        return
    devices = ", ".join(environment.devices) or "none"
    yield "Neuron devices", f"{devices}  ({environment.instance or 'unknown machine'})"
    stack = stack_of(environment.versions)
    read_as = nki_of(environment.versions)
    yield "Neuron SDK", f"{stack.sdk if stack else 'none'}  (kernels are read as by nki {read_as})"
