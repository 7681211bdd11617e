"""Serve a folder with `vllm serve`, send it requests of every kind, many at once, kill the server among
them and start it again.

    python -m tests.load build/int8 --dense build/smollm2/dense    # 500 requests to each, in turns
    python -m tests.load build/c20 --seconds 1800                  # for how long memory is watched
    python -m tests.load build/c20 --tp 2                          # or --compile

Exit code 1 where an answer is not the one of the request alone, a wrong request is not refused, a request
still runs when its client has gone, memory grows, or something on disk is not what it was.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from tests.load.server import Server
from tests.load.traffic import KINDS, Traffic

SLICE = 50  # requests after which the other server has its turn
GROWTH = 1.02  # of memory, the last third over the middle one


class Served:
    """A server with what is known of it."""

    def __init__(self, server: Server) -> None:
        self.server, self.traffic = server, Traffic(server.url)
        self.memory: list[int] = []
        self.wall_s = self.processor_s = 0.0

    async def turn(self, keys: list[str], at_once: int) -> None:
        """Some requests, with their time and, each second, the memory."""
        began, used = time.monotonic(), self.server.processor_s()
        flood = asyncio.create_task(self.traffic.flood(keys, at_once))
        while not flood.done():
            self.memory.append(await asyncio.to_thread(self.server.memory_bytes))
            await asyncio.wait([flood], timeout=1)
        await flood
        self.wall_s += time.monotonic() - began
        self.processor_s += self.server.processor_s() - used

    def grown(self) -> float:
        third = len(self.memory) // 3
        return statistics.mean(self.memory[2 * third :]) / statistics.mean(
            self.memory[third : 2 * third or 1]
        )


async def load(every: list[Served], requests: int, seconds: float, seed: int) -> None:
    """In turns, 16 at once and 32 at once, until so many requests were sent and the time is over."""
    for served in every:
        await served.traffic.learn()
    began, sent = time.monotonic(), 0
    while sent < requests or time.monotonic() - began < seconds:
        keys = [f"{seed}:{number}" for number in range(sent, sent + SLICE)]
        for served in every:
            await served.turn(keys, 32 if sent // SLICE % 2 else 16)
        sent += SLICE


async def restart(served: Served, seed: int) -> tuple[int, bool]:
    """Kill among 32 requests; how many were lost, and whether the answers after a new start are the same."""
    before = Traffic(served.server.url)
    before.model, before.alone = served.traffic.model, served.traffic.alone
    flood = asyncio.create_task(before.flood([f"{seed}:kill:{n}" for n in range(64)], 32))
    await asyncio.sleep(5)
    served.server.kill()
    await flood
    ended = collections.Counter(outcome for kind, outcome in before.outcomes.elements())
    served.server.start()
    served.server.wait()
    same = await Traffic(served.server.url).learn() == before.alone
    return ended["lost"], same and not {"wrong", "failed", "accepted"} & set(ended)


def report(served: Served) -> bool:
    """Print a table of what became of the requests, and a line on memory and speed. Whether all is well."""
    traffic, thirds = served.traffic, served.grown()
    print(f"\n{served.server.folder.name}\n\n| kind | sent | as it should | otherwise |\n|---|---|---|---|")
    for kind, (good, _) in KINDS.items():
        counts = {outcome: n for (k, outcome), n in traffic.outcomes.items() if k == kind}
        others = ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if outcome != good) or "0"
        print(f"| {kind} | {sum(counts.values())} | {counts.get(good, 0)} {good} | {others} |")
    print(
        f"\n{traffic.tokens} tokens of right answers, {traffic.tokens / served.wall_s:.1f} tokens/s, "
        f"{traffic.tokens / served.processor_s:.1f} per second of processor time; memory "
        f"{served.memory[0] >> 20} MiB at first, {max(served.memory) >> 20} at most, last third over middle "
        f"third {thirds:.4f}, {len(served.memory)} samples in {served.wall_s:.0f} s",
        flush=True,
    )
    tenths = [served.memory[len(served.memory) * n // 10] >> 20 for n in range(10)]
    print(f"memory, MiB, in equal steps of time: {tenths}", flush=True)
    for line in traffic.told:
        print(line, file=sys.stderr, flush=True)
    return not traffic.told and thirds < GROWTH


def state(folder: pathlib.Path) -> list[tuple[str, int, int]]:
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--dense", type=pathlib.Path, help="serve this too, in turns, for its speed")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=0, help="go on for so long at least")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=pathlib.Path, help="folder for what the servers say")
    args = parser.parse_args()
    logs = args.log or pathlib.Path(tempfile.mkdtemp(prefix="neuronmlp-load-"))
    options = () if args.compile else ("--enforce-eager",)
    folders, before = [args.folder, *([args.dense] if args.dense else [])], state(args.folder)
    every: list[Served] = []
    try:
        for index, folder in enumerate(folders):
            every.append(Served(Server(folder, logs / f"{index}.log", *options, tp=args.tp)))
            every[-1].server.wait()
        asyncio.run(load(every, args.requests, args.seconds, args.seed))
        idle = [served.server.idle() for served in every]
        good = all([report(served) for served in every])  # noqa: C419 (each is printed)
        lost, same = asyncio.run(restart(every[0], args.seed))
    finally:
        for served in every:
            served.server.stop()
    verify = [sys.executable, "-m", "neuronmlp_plugin.cli", "inspect", str(args.folder), "--verify"]
    whole = subprocess.run(verify, stdout=subprocess.DEVNULL, check=False).returncode == 0
    kept = whole and state(args.folder) == before
    print(f"\nnothing left running: {idle}; killed among 64 requests: {lost} lost, the same answers after a new start:"
          f" {same}; folder as it was: {kept}")  # fmt: skip
    return 0 if good and all(idle) and same and kept else 1


if __name__ == "__main__":
    sys.exit(main())
