"""Kill commands with SIGKILL, before each file that they write gets its name and at random moments, or let no
file grow beyond some bytes, and see that the same command goes on to the same bytes.

    python -m tests.faults --random 50 --seed 0                          # on a tiny model
    python -m tests.faults --model build/smollm2 --only-random --random 3      # on the real one
"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys
import tempfile
import time

from tests.faults.kills import COMMANDS, Bench

FILE_BYTES = (0, 1000, 4000, 20000, 60000, 200000)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--command", choices=[*COMMANDS, "all"], default="all")
    parser.add_argument(
        "--random", type=int, default=10, help="random moments of each command (default %(default)s)"
    )
    parser.add_argument(
        "--every", type=int, default=1, help="of the files, each so-manieth (default %(default)s)"
    )
    parser.add_argument("--only-random", action="store_true", help="at random moments, nothing else")
    parser.add_argument("--model", type=pathlib.Path, help="folder of dense/ and calibration.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(
        "| command | killed before a file | killed at random | no room | went on to the same bytes |\n"
        "|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="neuronmlp-faults-") as scratch:
        bench = Bench(pathlib.Path(scratch), args.model)
        for command in COMMANDS if args.command == "all" else [args.command]:
            bench.made(command)
            began = time.monotonic()
            bench.round(command)
            whole_s = time.monotonic() - began
            files = 0
            while not args.only_random and bench.round(command, at_file=files):
                files += args.every
            rng = random.Random(f"{args.seed}:{command}")
            killed = sum(bench.round(command, after_s=rng.uniform(0, whole_s)) for _ in range(args.random))
            sizes = () if args.only_random else FILE_BYTES
            full = sum(bench.full(command, size) for size in sizes)
            print(
                f"| {command} | {files // args.every} | {killed} of {args.random} | {full} of {len(sizes)} "
                "| all |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
