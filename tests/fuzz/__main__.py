"""Feed wrong inputs to everything that reads a file of somebody else's, and count what becomes of them.

    python -m tests.fuzz --count 1000 --seed 0                       # of every target
    python -m tests.fuzz --target config --seed 0 --only 17          # one input again, with its traceback

Exit code 1 where an input ended in an exception that is not ours, took over two seconds, or left a file
outside.
"""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.run import OUTCOMES, run_target
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--count", type=int, default=100, help="inputs of each target (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this input alone")
    args = parser.parse_args()
    print("| target | seed | inputs | " + " | ".join(OUTCOMES) + " | slowest, s |", flush=True)
    print("|---" * (len(OUTCOMES) + 4) + "|")
    good = True
    for name in TARGETS if args.target == "all" else [args.target]:
        count = max(1, round(args.count * TARGETS[name].share))
        numbers = range(count) if args.only is None else [args.only]
        found = run_target(name, args.seed, numbers, bounded=True)
        counts = " | ".join(str(found.counts[outcome]) for outcome in OUTCOMES)
        print(f"| {name} | {args.seed} | {len(numbers)} | {counts} | {found.slowest_s:.2f} |", flush=True)
        for line in found.told:
            print(line, file=sys.stderr, flush=True)
        good &= not found.told
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
