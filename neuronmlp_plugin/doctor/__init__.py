"""`neuronmlp doctor`: look at this machine once, and say what keeps the fast path from running, each finding
with its fix.
"""

from __future__ import annotations

import argparse
import dataclasses
import json


def run(args: argparse.Namespace) -> int:
    """Print all findings (`--json` as JSON); exit code 1 if one of them is a problem."""
    from neuronmlp_plugin.doctor.checks import PROBLEM, ask_compiler, examine
    from neuronmlp_plugin.doctor.environment import observe
    from neuronmlp_plugin.doctor.stacks import nki_of, stack_of

    environment = observe()
    findings = [*examine(environment), *ask_compiler(environment)]
    if args.json:
        values = {
            "environment": dataclasses.asdict(environment),
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }
        print(json.dumps(values, indent=2))
    else:
        for name, version in environment.versions.items():
            print(f"{name:32} {version}")
        print(
            f"{'Neuron devices':32} {', '.join(environment.devices) or 'none'}  "
            f"({environment.instance or 'unknown machine'})"
        )
        stack = stack_of(environment.versions)
        print(
            f"{'Neuron SDK':32} {stack.sdk if stack else 'none'}  (kernels are read as by nki "
            f"{nki_of(environment.versions)})"
        )
        for finding in findings:
            print(f"\n{finding.severity}: {finding.what}\n  fix: {finding.fix}")
        if not findings:
            print("\nnothing to report")
    return int(any(finding.severity == PROBLEM for finding in findings))
