"""One target, many inputs: each made from its number and the seed alone, used, classified, and taken back."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import random
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from typing import Any

from neuronmlp_plugin.errors import NeuronMLPError
from tests.fuzz.targets import TARGETS, Target

OUTCOMES = ("accepted", "refused", "foreign", "slow", "outside")
SLOW_S = 2.0  # of this process's own time: the machine may be busy
HANG_S = 120
MEMORY_BYTES = 4 << 30  # beyond which an allocation fails


@dataclasses.dataclass
class Found:
    """Counts by outcome; `told` has a line, or a traceback, for each input that is a defect."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    told: list[str] = dataclasses.field(default_factory=list)
    slowest_s: float = 0.0


class _Hung(BaseException):
    """No library may take it for an error of its own."""


def run_target(name: str, seed: int, numbers: Iterable[int], bounded: bool = False) -> Found:
    """Inputs `numbers` of a target. `bounded` limits the time of each and the memory of this process, for
    good: not in a process that does anything else.
    """
    target, found = TARGETS[name], Found()
    if bounded:
        _limit()
    with tempfile.TemporaryDirectory(prefix="neuronmlp-fuzz-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = pathlib.Path(scratch) / "inside"
        folder.mkdir()
        target.prepare(folder)
        target.use(folder)  # whole, it is accepted; and no input is slow for what was to be imported
        for number in numbers:
            if bounded:
                signal.alarm(HANG_S)
            _one(target, folder, f"{seed}:{name}:{number}", found)
        if bounded:
            signal.alarm(0)
    return found


def _one(target: Target, folder: pathlib.Path, key: str, found: Found) -> None:
    rng = random.Random(key)
    path = folder / rng.choice(target.files)
    before = path.read_bytes()
    path.write_bytes(target.change(rng, before))
    try:
        outcome, told, took = used(target, folder)
    finally:
        path.write_bytes(before)
    found.slowest_s = max(found.slowest_s, took)
    beside = {path.name for path in folder.parent.iterdir()} - {"inside"}
    found.counts[outcome] += 1
    for is_so, what in ((took > SLOW_S, "slow"), (bool(beside), "outside")):
        if is_so:
            found.counts[what] += 1
            told += f"{what}: {took:.1f} s, beside the folder: {sorted(beside)}\n"
    if told:
        found.told.append(f"--- {key}, in {path.relative_to(folder)}\n{told}")


def used(target: Target, folder: pathlib.Path) -> tuple[str, str, float]:
    """The outcome, its traceback where it is a defect, and seconds of this process; the fewer of two tries
    where one was slow, since a machine that stalls does not do so twice.
    """
    outcome, told, took = _used_once(target, folder)
    if took > SLOW_S:
        took = min(took, _used_once(target, folder)[2])
    return outcome, told, took


def _used_once(target: Target, folder: pathlib.Path) -> tuple[str, str, float]:
    outcome, told, began = "accepted", "", time.process_time()
    try:
        target.use(folder)
    except NeuronMLPError:
        outcome = "refused"
    except (Exception, _Hung):
        outcome, told = "foreign", traceback.format_exc(limit=-6)
    except BaseException as error:  # a panic of a library in Rust is none of Python's own kinds
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        outcome, told = "foreign", traceback.format_exc(limit=-6)
    return outcome, told, time.process_time() - began


def _limit() -> None:
    def hung(*_: Any) -> None:
        raise _Hung

    signal.signal(signal.SIGALRM, hung)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (resident + MEMORY_BYTES, hard))
