"""The same wrong inputs, led by coverage: atheris (libFuzzer) keeps each input that reaches new code of ours, and
changes that one further.

    pip install atheris                                        # not a part of the project's own environment
    python -m tests.fuzz.guided config -max_total_time=300     # further options are libFuzzer's

It stops at the first input that ends in an exception that is not ours, takes over two seconds, or leaves a file
outside, and writes that input into the current folder.
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import random
import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["neuronmlp_plugin"]):
    from tests.fuzz.run import SLOW_S, used
    from tests.fuzz.targets import TARGETS, Target

LONGEST = 1 << 16  # bytes of an input
COUNTED = 500  # inputs after which the counts so far are told: libFuzzer ends the process at once


class Guided:
    """One target, whose file holds what libFuzzer says."""

    def __init__(self, name: str, scratch: pathlib.Path) -> None:
        self.name, self.target = name, TARGETS[name]
        self.folder, self.corpus = scratch / "inside", scratch / "corpus"
        for folder in (self.folder, self.corpus):
            folder.mkdir()
        self.target.prepare(self.folder)
        self.target.use(self.folder)
        (file,) = self.target.files
        self.file, self.beside = self.folder / file, {path.name for path in scratch.iterdir()}
        (self.corpus / "whole").write_bytes(self.file.read_bytes())
        self.counts: collections.Counter[str] = collections.Counter()
        self.slowest_s = 0.0

    def feed(self, data: bytes) -> None:
        self.file.write_bytes(data)
        outcome, told, took = used(self.target, self.folder)
        self.counts[outcome] += 1
        self.slowest_s = max(self.slowest_s, took)
        if self.counts.total() % COUNTED == 0:
            self.tell()
        left = {path.name for path in self.folder.parent.iterdir()} - self.beside
        assert not told and took <= SLOW_S and not left, f"{told} {took:.1f} s, left {sorted(left)}"

    def changed(self, data: bytes, longest: int, seed: int) -> bytes:
        """As the target changes its file, or as libFuzzer changes bytes."""
        rng = random.Random(seed)
        return (_as_target(self.target, rng, data) or atheris.Mutate(data, longest))[:longest]

    def tell(self) -> None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.counts.items()))
        print(f"{self.name}: {counts}; slowest {self.slowest_s:.2f} s", file=sys.stderr, flush=True)


def _as_target(target: Target, rng: random.Random, data: bytes) -> bytes | None:
    """None for every second input, and for those that are no longer of the kind that the target changes."""
    if rng.random() < 0.5:
        return None
    try:
        return target.change(rng, data)
    except (ValueError, RecursionError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description=__doc__)
    parser.add_argument(
        "target", choices=[name for name, target in TARGETS.items() if len(target.files) == 1]
    )
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="neuronmlp-fuzz-") as scratch:
        child = os.fork()
        if not child:
            guided = Guided(args.target, pathlib.Path(scratch))
            given = [sys.argv[0], f"-max_len={LONGEST}", *options, str(guided.corpus)]
            atheris.Setup(given, guided.feed, custom_mutator=guided.changed)
            atheris.Fuzz()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
